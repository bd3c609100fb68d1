"""`latentsmith generate --again`: is a picture what its checkpoint draws?"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentsmith.inference.png import read_made

from .generate import generate


def again(picture: Path, out: Path, *, source: str | None = None, device: str = "auto") -> bool:
    """Make a picture again into `out` from what it says of itself; prints what differs; returns whether nothing does.

    source: the checkpoint, where it lies elsewhere now.
    """
    made = read_made(picture)
    options, model = made["options"], made["model"]
    files: dict[str, Any] = {name: Path(made[name]["file"]) for name in ("image", "mask") if made.get(name)}
    (path,) = generate(
        source or model["from"], [made["prompt"]], out, negative_prompt=made["negative_prompt"], seed=made["seed"],
        variation_seed=made["variation_seed"], device=device, dtype=model["dtype"], weights=model["weights"],
        prediction_type=model["prediction_type"], batch_size=1, **files, **options,
    )  # fmt: skip
    now = read_made(path)
    for place in ("model", "versions", "image", "mask"):
        before, after = made.get(place) or {}, now.get(place) or {}
        for name in before:
            if name not in ("from", "file") and before[name] != after.get(name):
                print(f"{place} {name}: {before[name]} then, {after.get(name)} now")
    with Image.open(picture) as then, Image.open(path) as new:
        pixels = [np.asarray(each, dtype=int) for each in (then, new)]
    if pixels[0].shape != pixels[1].shape:
        print(f"{path}: of another size")
        return False
    apart = abs(pixels[0] - pixels[1])
    if not apart.any():
        print(f"{path}: the same, pixel for pixel")
        return True
    print(f"{path}: {(apart.max(-1) > 0).mean():.2%} of the pixels differ, by {apart.max()} of 255 at most")
    return False
