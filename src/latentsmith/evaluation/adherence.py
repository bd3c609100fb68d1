"""Adherence of the demo's scenes as metrics: the share of images whose attributes are those of the prompt."""

from collections.abc import Sequence

import numpy as np

from latentsmith.demo.adherence import ATTRIBUTES, SceneReader
from latentsmith.demo.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption
from latentsmith.files.errors import BadInput

from .images import Images
from .intervals import Sampled, mean_of
from .run import captions_of


def adherence_of(images: Images, prompts: Sequence[str] | None, resamples: int, seed: int) -> dict[str, Sampled]:
    """Return the shares of images right in all attributes (`adherence`) and in each.

    Raises BadInput for prompts that are no captions of the demo.
    """
    reader, rows = SceneReader(), []
    for number, prompt in enumerate(prompts if prompts is not None else captions_of(images)):
        scene, reading = scene_of(prompt), reader.read_scene(np.asarray(images.read(number)))
        rows.append([float(getattr(reading, name) == getattr(scene, name)) for name in ATTRIBUTES])
    right = np.array(rows)
    columns = {"adherence": right.min(axis=1)} | {
        f"adherence_{name}": right[:, at] for at, name in enumerate(ATTRIBUTES)
    }
    return {name: mean_of(values, resamples, seed) for name, values in columns.items()}


def scene_of(prompt: str) -> Scene:
    """Return the scene that a caption of the demo describes. Raises BadInput for any other text."""
    words = prompt.split()
    background = next((name for name in BACKGROUNDS if f"on a {name} background" in prompt), None)
    position = max((name for name in POSITIONS if f"the {name} on" in prompt), key=len, default=None)
    colour, shape, size = (
        next((name for name in each if name in words[:4]), None) for each in (COLOURS, SHAPES, SIZES)
    )
    if background and position and colour and shape and size:
        scene = Scene(colour, shape, size, position, background)
        if caption(scene) == prompt:
            return scene
    raise BadInput(f'metrics adherence: "{prompt[:60]}" is no caption of the demo\'s scenes')
