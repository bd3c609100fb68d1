"""PNGs that say how they were made: as JSON of our own, and as the `parameters` text of web UIs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.images import open_image

OWN_KEY = "latentsmith"
LONGEST_STEM = 60
WEB_NAMES = {
    "ddim": "DDIM", "ddpm": "DDPM", "plms": "PLMS", "dpmsolver++": "DPM++ 2M", "dpmsolver++_sde": "DPM++ 2M SDE",
    "dpmsolver++_singlestep": "DPM++ 2S", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "lms": "LMS",
    "unipc": "UniPC", "para_ddim": "DDIM",
}  # fmt: skip


def save_picture(picture: Image.Image, folder: Path, made: Mapping[str, Any], name: str | None = None) -> Path:
    """Write a PNG under a name of letters, digits and dashes that no other file has, whoever else writes there.

    made: what drew it; "prompt", "negative_prompt", "seed" and "options" are read here. name: write NAME.png instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", made["prompt"].lower()).strip("-")[:LONGEST_STEM].strip("-") or "picture"
    info = PngInfo()
    info.add_text(OWN_KEY, json.dumps(made))
    info.add_itxt("parameters", parameters_text(made, picture.size).encode("utf-8", "replace").decode())
    path = free_path(folder, f"{stem}-seed{made['seed']}") if name is None else folder / f"{name}.png"
    try:
        with atomic_open(path) as file:
            picture.save(file, format="PNG", pnginfo=info)
    except BaseException:
        if name is None:  # the empty file that held the name
            path.unlink(missing_ok=True)
        raise
    return path


def free_path(folder: Path, stem: str) -> Path:
    """A new, empty file: stem.png, stem-2.png, ...; taken in one step, so that no two writers get the same."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            path.open("xb").close()
            return path
        except FileExistsError:
            number += 1


def parameters_text(made: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The text that web UIs read back: prompt, negative prompt, then settings by name."""
    options = made["options"]
    negative = f"\nNegative prompt: {made['negative_prompt']}" if made["negative_prompt"] else ""
    settings = {
        "Steps": options["steps"],
        "Sampler": WEB_NAMES[made["sampler"]],
        "Schedule type": "Karras" if "karras" in options["sampler"].lower() else None,
        "CFG scale": options["guidance_scale"],
        "Seed": made["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": made["model"]["hash"][:10],
        "Model": Path(made["model"]["from"]).stem.replace(",", " "),
        "Denoising strength": options["strength"] if made["image"] else None,
        "Variation seed": made["variation_seed"] if options["variation_strength"] else None,
        "Variation seed strength": options["variation_strength"] or None,
        "Eta": options["eta"] or None,
        "RNG": "CPU",
        "Version": f"latentsmith {made['versions']['latentsmith']}",
    }
    return (
        made["prompt"]
        + negative
        + "\n"
        + ", ".join(f"{k}: {value}" for k, value in settings.items() if value is not None)
    )


def read_made(path: Path) -> dict[str, Any]:
    """What a picture says of how it was made; BadInput for a file that is no picture of ours."""
    with open_image(path) as picture:
        text = picture.info.get(OWN_KEY)
    try:
        made = json.loads(text or "")
        model = {name: made["model"][name] for name in ("from", "weights", "dtype", "prediction_type", "hash")}
        return {**made, "seed": int(made["seed"]), "variation_seed": int(made["variation_seed"]),
                "prompt": str(made["prompt"]), "negative_prompt": made["negative_prompt"],
                "options": dict(made["options"]), "model": {**made["model"], **model}}  # fmt: skip
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{path}: does not say how it was made; `latentsmith generate` writes pictures that do"
        ) from None
