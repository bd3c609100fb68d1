"""Images for fixed prompts at fixed noise while a model trains."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.inference import Pipeline

from .module import StepCallback, TrainingModule, frozen, tolerated

PROMPTS = "prompts"  # key of a PNG's text: a JSON list, from left to right


class SampleLog(StepCallback):
    """Draws `prompts` every `every_n_steps` optimizer steps.

    Writes one row of pictures, `folder`/step-N.png. averaged: draw with the averages, where there are any.
    options: of `Pipeline.__call__`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        every_n_steps: int,
        *,
        prompts: list[str],
        averaged: bool = True,
        **options: Any,
    ):
        self.pipeline, self.folder, self.every_n_steps, self.averaged = pipeline, folder, every_n_steps, averaged
        self.prompts, self.options = prompts, options

    def on_step_end(self, trainer, module) -> None:
        due = self.prompts and module.progress.global_step % self.every_n_steps == 0
        if due and (trainer.is_global_zero or module.sharded):  # one process cannot run what all hold a share of
            self.draw(module)

    def draw(self, module: TrainingModule) -> None:
        """One row of pictures of the present weights; their training goes on as if nothing had been drawn."""
        try:
            with frozen(module), module.averaged() if self.averaged else nullcontext():
                pictures = self.pipeline(self.prompts, **self.options).images
        except BadInput as error:  # early weights may draw what is no picture
            print(f"no sample pictures at step {module.progress.global_step}: {error}")
            return
        if not module.trainer.is_global_zero:
            return
        row = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
        module.metrics.pictures["samples"] = row
        with tolerated("sample pictures"):
            save_row(row, self.prompts, self.folder / f"step-{module.progress.global_step:08d}.png")


def save_row(pixels: np.ndarray, prompts: list[str], path: Path) -> None:
    """Save images that lie side by side, (height, width, 3), uint8, as a PNG with their prompts in its text."""
    row, text = Image.fromarray(pixels), PngInfo()
    text.add_itxt(PROMPTS, json.dumps(prompts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        row.save(file, format="PNG", pnginfo=text)
