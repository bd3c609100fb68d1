"""`latentsmith generate --again`: does a checkpoint still make this image?"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput
from latentsmith.files.images import read_image
from latentsmith.image_request import ImageRequest, SamplingOptions, descriptions

from .generate import ADAPTERS, described, generate
from .png import read_metadata

ROUNDING = 1  # of 255: sums over another batch are rounded in another order


def reproduce(original: Path, out: Path, *, source: str | None = None, device: str = "auto", **moved: Any) -> bool:
    """Make an image again into `out` from its metadata; print what differs; return whether nothing does.

    source, and image, mask, tokenizer, loras and embeddings among `moved`: where these lie now, if elsewhere.
    A difference of 1 of 255 is reported and counts as none.
    """
    metadata = read_metadata(original)
    options, model = metadata["options"], metadata["model"]
    if unknown := options.keys() - {field.name for field in fields(SamplingOptions)}:
        raise BadInput(f"{original}: made with {min(unknown)}, which this version does not know; use a newer one")
    files: dict[str, Any] = {name: Path(metadata[name]["file"]) for name in ("image", "mask") if metadata.get(name)}
    if metadata.get("tokenizer"):
        files["tokenizer"] = metadata["tokenizer"]
    files |= adapter_files(original, metadata, moved)
    own = {name: metadata[name] for name in descriptions(ImageRequest)}
    (path,) = generate(
        source or model["from"], [metadata["prompt"]], out, device=device, dtype=model["dtype"],
        weights=model["weights"], prediction_type=model["prediction_type"], batch_size=1,
        **{**files, **moved, **own, **options},
    )  # fmt: skip
    changed = differences(metadata, read_metadata(path))
    for line in changed:
        print(line)
    before, after = (np.asarray(read_image(each).convert("RGB"), dtype=int) for each in (original, path))
    if before.shape != after.shape:
        print(f"{path}: of another size")
        return False
    apart = abs(before - after)
    if apart.any():
        print(f"{path}: {(apart.max(-1) > 0).mean():.2%} of the pixels differ, by {apart.max()} of 255 at most")
    else:
        print(f"{path}: the same, pixel for pixel")
    return apart.max() <= ROUNDING and not any(line.startswith(("model hash", "image", "mask")) for line in changed)


def adapter_files(original: Path, metadata: Mapping[str, Any], moved: dict[str, Any]) -> dict[str, Any]:
    """Return the adapters and trained words of an image: the files it records, or the same ones among `moved`.

    Raises BadInput for a file that is missing or is another one.
    """
    given = [path for path, _ in moved.pop("loras", ())] + list(moved.pop("embeddings", ()))
    by_hash = {(described(path) or {})["hash"]: path for path in given if path.exists()}
    found: dict[str, list[Path]] = {key: [] for key in ADAPTERS}
    for key in ADAPTERS:
        for each in metadata.get(key, []):
            path = by_hash.get(each["hash"], Path(each["file"]))
            if not path.exists() or (described(path) or {})["hash"] != each["hash"]:
                state = "is another file now" if path.exists() else "is not there"
                option = "--lora" if key == "loras" else "--embedding"
                raise BadInput(f"{original}: was made with {path}, which {state}; give {option} FILE, the same one")
            found[key].append(path)
    weights = [each["weight"] for each in metadata.get("loras", [])]
    return {"loras": list(zip(found["loras"], weights, strict=True)), "embeddings": found["embeddings"]}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return where two images' metadata disagree on the model, the versions and the files they started from."""
    lines = []
    for section in ("model", "versions", "image", "mask"):
        then, now = before.get(section) or {}, after.get(section) or {}
        names = [name for name in then if name not in ("from", "file") and then[name] != now.get(name)]
        lines += [f"{section} {name}: {then[name]} then, {now.get(name)} now" for name in names]
    return lines
