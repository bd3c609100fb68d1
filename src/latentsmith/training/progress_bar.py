"""The live line of a training: loss, speed, time left."""

import resource
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


class DataWait(L.Callback):
    """Records `data_wait`: the smoothed share of a step's time that is spent on waiting for its batch.

    The last callback, so that what others do after a step does not count.
    """

    def __init__(self) -> None:
        self.ended = self.began = 0.0
        self.share: float | None = None

    def on_train_start(self, trainer, module) -> None:
        module.record(data_wait=0.0)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        now = time.monotonic()
        if self.ended:
            share = (now - self.ended) / max(1e-9, now - self.began)
            self.share = share if self.share is None else SMOOTHING * self.share + (1 - SMOOTHING) * share
            module.record(data_wait=self.share)
        self.began = now

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.ended = time.monotonic()


def peak_memory(device: torch.device) -> float:
    """The largest memory so far, GiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


class ProgressLine(StepCallback):
    """A bar on a terminal, else a plain line now and then: step, smoothed loss, lr, samples/s, data wait, time left.

    Records `samples_per_second` and `memory_gib`, the largest so far."""

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
        before = loss if self.loss is None else self.loss
        mean = torch.where(before.isfinite(), torch.lerp(loss, before, SMOOTHING), loss)
        self.loss = torch.where(loss.isfinite(), mean, before)  # a step that was skipped does not count
        step, now = module.progress.global_step, time.monotonic()
        steps_per_second = (step - self.first) / max(1e-9, now - self.started)
        samples_per_second = steps_per_second * module.optimisation.global_batch
        module.record(samples_per_second=samples_per_second, memory_gib=peak_memory(module.device))
        every = BAR_SECONDS if self.console.is_terminal else PLAIN_SECONDS
        if now - self.shown < every and step != self.max_steps:
            return
        self.shown = now
        line = f"loss {float(self.loss):.4f}  lr {float(module.metrics.values['lr']):.2e}"
        line += f"  {samples_per_second:.1f} samples/s  data wait {module.metrics.values.get('data_wait', 0.0):.0%}"
        self.bar.update(self.task, completed=step, line=line)
        if not self.console.is_terminal:
            left = (self.max_steps - step) / max(steps_per_second, 1e-9)
            print(f"step {step}/{self.max_steps}  {line}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def on_train_end(self, trainer, module) -> None:
        self.bar.stop()

    def on_exception(self, trainer, module, exception) -> None:
        self.bar.stop()
