"""`latentsmith generate`: pictures from prompts, each with what made it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentsmith.files.atomic import atomic_open
from latentsmith.inference import Pipeline

from .progress import progress


def generate(
    source: str,
    prompts: Sequence[str],
    out: Path,
    *,
    negative_prompt: str | None = None,
    steps: int = 25,
    guidance_scale: float = 7.5,
    sampler: str = "dpmsolver++",
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    count: int = 1,
    batch_size: int = 8,
    device: str = "auto",
) -> list[Path]:
    """Draw `count` pictures of every prompt into `out`; picture i of a prompt uses seed + i. Returns the PNGs."""
    pipeline = Pipeline.from_pretrained(source, device=device)
    wanted = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    paths: list[Path] = []
    options = dict(steps=steps, guidance_scale=guidance_scale, sampler=sampler)
    with progress("drawing", "pictures") as tell:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            pictures = pipeline(
                [prompt for prompt, _ in batch],
                negative_prompt,
                seed=[one for _, one in batch],
                height=height,
                width=width,
                batch_size=batch_size,
                **options,  # type: ignore[arg-type]
            )
            for picture, (prompt, one) in zip(pictures, batch, strict=True):
                made = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": one, "from": source, **options}
                paths.append(save_picture(picture, out, made))
            tell(len(paths), len(wanted))
    print(f"{out}: {len(paths)} pictures")
    return paths


def save_picture(picture: Image.Image, folder: Path, made: dict) -> Path:
    """Write a PNG under a name that is free, with what made it as JSON and as web UIs' `parameters` text."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", made["prompt"].lower()).strip("-")[:60] or "picture"
    name = f"{stem}-seed{made['seed']}"
    path, number = folder / f"{name}.png", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.png", number + 1
    info = PngInfo()
    info.add_text("latentsmith", json.dumps(made))
    info.add_text("parameters", parameters_text(made, picture.size))
    with atomic_open(path) as file:
        picture.save(file, format="PNG", pnginfo=info)
    return path


def parameters_text(made: dict, size: tuple[int, int]) -> str:
    """The text that web UIs read back: prompt, negative prompt, then settings by name."""
    negative = f"\nNegative prompt: {made['negative_prompt']}" if made["negative_prompt"] else ""
    settings = {
        "Steps": made["steps"],
        "Sampler": made["sampler"],
        "CFG scale": made["guidance_scale"],
        "Seed": made["seed"],
        "Size": f"{size[0]}x{size[1]}",
    }
    return made["prompt"] + negative + "\n" + ", ".join(f"{key}: {value}" for key, value in settings.items())
