"""Sample images for fixed prompts at fixed noise while a model trains."""

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

from ..loop import Step, Training
from . import Hook, evaluating, log_os_errors
from .metrics import Metrics

PROMPTS = "prompts"  # key of a PNG's text: a JSON list, from left to right


class SampleImages(Hook):
    """Samples `prompts` every `every_n_steps` optimizer steps into one row of images, `folder`/step-N.png.

    averaged: sample with the averages, where there are any. options: of `Pipeline.__call__`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        every_n_steps: int,
        log: Metrics,
        *,
        prompts: list[str],
        averaged: bool = True,
        **options: Any,
    ):
        self.pipeline, self.folder, self.every_n_steps, self.log = pipeline, folder, every_n_steps, log
        self.prompts, self.averaged, self.options = prompts, averaged, options

    def after_step(self, training: Training, step: Step) -> None:
        due = training.state.global_step % self.every_n_steps == 0
        if due and (training.fabric.is_global_zero or training.state.sharded):  # one process cannot run shards alone
            self.sample(training)

    def sample(self, training: Training) -> None:
        """Sample one row with the present weights; their training continues as if nothing had been sampled."""
        number = training.state.global_step
        averaged = training.state.averaged() if self.averaged else nullcontext()
        try:
            with evaluating(training.objective), training.state.for_evaluation(), averaged:
                images = self.pipeline(self.prompts, **self.options).images
        except BadInput as error:  # early weights may give values that are not finite
            print(f"no sample images at step {number}: {error}")
            return
        if training.fabric.is_global_zero:
            row = np.concatenate([np.asarray(image) for image in images], axis=1)
            self.log.image("samples", row, number)
            with log_os_errors("sample images"):
                save_row(row, self.prompts, self.folder / f"step-{number:08d}.png")


def save_row(pixels: np.ndarray, prompts: list[str], path: Path) -> None:
    """Save images that lie side by side, (height, width, 3), uint8, as a PNG with their prompts in its text."""
    text = PngInfo()
    text.add_itxt(PROMPTS, json.dumps(prompts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=text)
