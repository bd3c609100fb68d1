"""The live line of a training: loss, speed, time left."""

import sys
import time

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .module import StepCallback, TrainingModule

SMOOTHING = 0.95  # share of the old value in the smoothed loss
PLAIN_SECONDS = 20.0  # between two lines where the output is no terminal
BAR_SECONDS = 0.5


class ProgressLine(StepCallback):
    """A bar on a terminal, else a plain line now and then: step, smoothed loss, lr, samples/s, time left."""

    def __init__(self, max_steps: int):
        self.max_steps = max_steps
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.loss: torch.Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        self.first = module.progress.global_step
        self.started = self.shown = time.monotonic()
        self.task = self.bar.add_task("training", total=self.max_steps, completed=self.first, line="")
        self.bar.start()

    def on_step_end(self, trainer, module) -> None:
        loss = module.metrics.values["loss"]  # stays on its device: reading it would wait for the step
        self.loss = loss if self.loss is None else torch.lerp(loss, self.loss, SMOOTHING)
        step, now = module.progress.global_step, time.monotonic()
        steps_per_second = (step - self.first) / max(1e-9, now - self.started)
        samples_per_second = steps_per_second * module.optimisation.global_batch
        module.record(samples_per_second=samples_per_second)
        every = BAR_SECONDS if self.console.is_terminal else PLAIN_SECONDS
        if now - self.shown < every and step != self.max_steps:
            return
        self.shown = now
        line = f"loss {float(self.loss):.4f}  lr {float(module.metrics.values['lr']):.2e}"
        line += f"  {samples_per_second:.1f} samples/s"
        self.bar.update(self.task, completed=step, line=line)
        if not self.console.is_terminal:
            left = (self.max_steps - step) / max(steps_per_second, 1e-9)
            print(f"step {step}/{self.max_steps}  {line}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def on_train_end(self, trainer, module) -> None:
        self.bar.stop()

    def on_exception(self, trainer, module, exception) -> None:
        self.bar.stop()
