"""PNGs that record how they were made: as JSON of our own, and as the `parameters` text of web UIs."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentsmith.diffusion import SAMPLERS
from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.images import open_image
from latentsmith.image_request import ImageRequest, descriptions
from latentsmith.text.prompts import lora_tags, web_ui_tags

OWN_KEY = "latentsmith"
LONGEST_STEM = 60
MARKS = re.compile(r"Negative prompt:|Steps:")  # where readers of `parameters` cut it


def save_image(image: Image.Image, folder: Path, metadata: Mapping[str, Any], name: str | None = None) -> Path:
    """Write a PNG under a name of letters, digits and dashes that no other file has, whoever else writes there.

    metadata: as GenerationModel makes it. name: write NAME.png instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", metadata["prompt"].lower()).strip("-")[:LONGEST_STEM].strip("-") or "image"
    info = png_info(metadata, image.size)
    path = free_path(folder, f"{stem}-seed{metadata['seed']}") if name is None else folder / f"{name}.png"
    try:
        with atomic_open(path) as file:
            image.save(file, format="PNG", pnginfo=info)
    except BaseException:
        if name is None:  # the empty file that reserved the name
            path.unlink(missing_ok=True)
        raise
    return path


def png_info(metadata: Mapping[str, Any], size: tuple[int, int]) -> PngInfo:
    """Return the texts of a PNG of this (width, height): as JSON, and as web UIs read them."""
    info = PngInfo()
    info.add_text(OWN_KEY, json.dumps(metadata))
    if (text := parameters_text(metadata, size)) is not None:
        info.add_itxt("parameters", text.encode("utf-8", "replace").decode())
    return info


def free_path(folder: Path, stem: str) -> Path:
    """Make a new, empty file: stem.png, stem-2.png, ...; in one step, so that no two writers get the same."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            path.open("xb").close()
            return path
        except FileExistsError:
            number += 1


def parameters_text(metadata: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    """Return the text that web UIs read back: prompt, negative prompt, then settings by their names there.

    Warns, and returns None, where they would read another prompt out of it.
    """
    options, varied = metadata["options"], metadata["variation_strength"]
    plain = options["prompt_syntax"] == "plain"
    prompt, negative = (web_ui_prompt(metadata[name] or "", plain) for name in ("prompt", "negative_prompt"))
    untagged = prompt if plain else lora_tags(prompt)[0]
    found = [*MARKS.findall(f"{prompt} {negative}"), *web_ui_tags(untagged), *web_ui_tags(negative)]
    if found:
        warnings.warn(f"a prompt with {found[0]!r} is not written for web UIs, which would misread it", stacklevel=3)
        return None
    tagged = {tag.name for tag in lora_tags(prompt)[1]}
    for lora in metadata.get("loras", []):
        prompt += f" <lora:{lora['name']}:{lora['weight']:g}>" if lora["name"] not in tagged else ""
    settings = {
        "Steps": options["num_inference_steps"],
        "Sampler": SAMPLERS[metadata["sampler"]].title,
        "Schedule type": "Karras" if _is_karras(metadata) else "Uniform",
        "CFG scale": metadata["guidance_scale"],
        "Seed": metadata["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": metadata["model"]["hash"][:10],
        "Model": Path(metadata["model"]["from"]).stem,
        "Prediction type": {"epsilon": None}.get(
            prediction := metadata["model"].get("prediction_type", "epsilon"), prediction
        ),
        "Long prompts": "cut" if options.get("long_prompts") == "cut" else None,
        "Denoising strength": options["strength"] if metadata["image"] else None,
        "Variation seed": metadata["variation_seed"] if varied else None,
        "Variation seed strength": varied or None,
        "Clip skip": options["clip_skip"] if options.get("clip_skip", 1) > 1 else None,
        "Eta": options["eta"] or None,
        "Timestep spacing": options["timestep_spacing"],
        "Guidance rescale": options["guidance_rescale"] or None,
        "RNG": "CPU",
        "Version": f"latentsmith {metadata['versions']['latentsmith']}",
    }
    listed = ", ".join(f"{name}: {quoted(str(value))}" for name, value in settings.items() if value is not None)
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), listed])


def _is_karras(metadata: Mapping[str, Any]) -> bool:
    """Return whether an image has Karras sigmas: by its sampler's name, or as its model's scheduler says."""
    options, sampler = metadata["options"], SAMPLERS[metadata["sampler"]]
    by_model = metadata["model"].get("karras_sigmas") and sampler.karras and not options["timestep_spacing"]
    return bool("karras" in options["sampler"].lower() or by_model)


def web_ui_prompt(prompt: str, plain: bool) -> str:
    """Return a prompt on one line, as web UIs' syntax has it. plain: its brackets are text."""
    return " ".join((re.sub(r"[\\()\[\]]", r"\\\g<0>", prompt) if plain else prompt).split())


def quoted(value: str) -> str:
    """Return a value as web UIs write it: as JSON where it holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\r]", value) else value


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what an image records of how it was made. Raises BadInput for a file that is no image of ours."""
    with open_image(path) as image:
        text = image.info.get(OWN_KEY)
    try:
        metadata = json.loads(text or "")
        stored = {name: metadata["model"][name] for name in ("from", "weights", "dtype", "prediction_type", "hash")}
        ImageRequest(metadata["prompt"], **{name: metadata[name] for name in descriptions(ImageRequest)})
        return {**metadata, "options": dict(metadata["options"]), "model": {**metadata["model"], **stored}}
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: does not record how it was made; images of `latentsmith generate` do") from None
