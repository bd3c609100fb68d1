"""`latentsmith generate --again`: is a picture what its checkpoint draws?"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput
from latentsmith.files.images import read_image

from . import SamplingOptions
from .generate import generate
from .png import read_made

ROUNDING = 1  # of 255: sums over another batch are rounded in another order


def again(picture: Path, out: Path, *, source: str | None = None, device: str = "auto", **moved: Any) -> bool:
    """Make a picture again into `out` from what it says of itself; prints what differs; returns whether nothing does.

    source, and image, mask and tokenizer among `moved`: where these lie now, if elsewhere.
    A difference of 1 of 255 is told and counts as none.
    """
    made = read_made(picture)
    options, model = made["options"], made["model"]
    if unknown := options.keys() - {field.name for field in fields(SamplingOptions)}:
        raise BadInput(f"{picture}: made with {min(unknown)}, which this version does not know; use a newer one")
    files: dict[str, Any] = {name: Path(made[name]["file"]) for name in ("image", "mask") if made.get(name)}
    files |= {"tokenizer": made["tokenizer"]} if made.get("tokenizer") else {}
    (path,) = generate(
        source or model["from"], [made["prompt"]], out, negative_prompt=made["negative_prompt"], seed=made["seed"],
        variation_seed=made["variation_seed"], device=device, dtype=model["dtype"], weights=model["weights"],
        prediction_type=model["prediction_type"], batch_size=1, **{**files, **moved, **options},
    )  # fmt: skip
    changed = list(differences(made, read_made(path)))
    print(*changed, sep="\n", end="\n" * bool(changed))
    pixels = [np.asarray(read_image(each).convert("RGB"), dtype=int) for each in (picture, path)]
    if pixels[0].shape != pixels[1].shape:
        print(f"{path}: of another size")
        return False
    apart = abs(pixels[0] - pixels[1])
    if apart.any():
        print(f"{path}: {(apart.max(-1) > 0).mean():.2%} of the pixels differ, by {apart.max()} of 255 at most")
    else:
        print(f"{path}: the same, pixel for pixel")
    return apart.max() <= ROUNDING and not any(line.startswith(("model hash", "image", "mask")) for line in changed)


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two pictures say of the model, its versions and what they started from, where they disagree."""
    lines = []
    for place in ("model", "versions", "image", "mask"):
        before, after = made.get(place) or {}, now.get(place) or {}
        names = [name for name in before if name not in ("from", "file") and before[name] != after.get(name)]
        lines += [f"{place} {name}: {before[name]} then, {after.get(name)} now" for name in names]
    return lines
