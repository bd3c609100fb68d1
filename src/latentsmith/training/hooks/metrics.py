"""Scalars of a training, by optimizer step: a CSV, TensorBoard, Weights & Biases and the progress bar."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentsmith.files.errors import BadInput
from latentsmith.files.memory import peak_bytes
from latentsmith.progress import Rate, progress

from ..loop import Step, Training
from ..metrics_log import METRICS_FILE, append_row, drop_rows_after, without_nan
from . import Hook, log_os_errors

SMOOTHING = 0.95  # share of the old value in the smoothed loss and data wait


class Metrics(Hook):
    """Writes the metrics of every `every_n_steps`-th step, averaged over the processes.

    To `folder`/metrics.csv; to TensorBoard events in `folder`/tensorboard if `tensorboard`; to Weights & Biases with
    `wandb`, the arguments of Lightning's WandbLogger. Raises BadInput where wandb is not installed.
    progress_bar: show smoothed loss, learning rate, speed and time left, and log what depends on the clock, too:
    `samples_per_second` of the last half minute, `memory_gib` (the largest so far) and `data_wait`, the smoothed share
    of the time that steps wait for their batches.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        progress_bar: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.every_n_steps, self.tensorboard, self.clock = folder, every_n_steps, tensorboard, clock
        self.progress_bar, self.closing, self.rate = progress_bar, ExitStack(), Rate()
        self.events: Any = None
        self.wandb = None if wandb is None else wandb_logger(folder, wandb)
        self.loss: Tensor | None = None  # smoothed, on its device
        self.shown_loss = float("nan")
        self.data_wait: float | None = None

    def on_start(self, training: Training) -> None:
        step = training.state.global_step
        self.stepped_at = self.clock()
        self.rate.update(step, self.stepped_at)
        if training.fabric.is_global_zero:
            drop_rows_after(self.folder / METRICS_FILE, step)
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        if self.progress_bar:
            batch = training.plan.global_batch
            self.bar = self.closing.enter_context(
                progress("training", "steps", rate_unit="samples", rate_scale=batch, clock=self.clock)
            )

    def after_step(self, training: Training, step: Step) -> None:
        number = training.state.global_step
        values = dict(step.metrics)
        if self.progress_bar:
            values |= self._timing(training, step)
        self.loss = smoothed(self.loss, torch.as_tensor(step.metrics["loss"]))
        if training.fabric.world_size == 1 and training.fabric.device.type == "cpu":
            self.shown_loss = float(self.loss)  # elsewhere the last row's: reading it waits, or is for all processes
        if number % self.every_n_steps == 0:
            means = over_processes(training, {**values, "smoothed": self.loss})
            self.shown_loss = means.pop("smoothed")
            if training.fabric.is_global_zero:
                with log_os_errors(f"row of step {number:,}"):
                    row = {"step": number, **{name: without_nan(value) for name, value in means.items()}}
                    append_row(self.folder / METRICS_FILE, row)
                self.scalars(means, number)
        if self.progress_bar:
            note = f"loss {self.shown_loss:.4f}, lr {values['lr']:.2e}, data wait {self.data_wait:.0%}"
            self.bar(number, training.plan.max_steps, note=note)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars to TensorBoard and Weights & Biases, where they are asked for."""
        named = {f"train/{name}": value for name, value in values.items()}
        if self.events:
            for name, value in named.items():
                self.events.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log_metrics(named, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Send pixels (height, width, 3), uint8, to TensorBoard, where it is asked for."""
        if self.events:
            self.events.add_image(name, pixels, step, dataformats="HWC")

    def on_end(self, training: Training) -> None:
        if self.wandb is not None:
            self.wandb.finalize("success")

    def close(self) -> None:
        self.closing.close()
        if self.events:
            self.events.close()

    def _timing(self, training: Training, step: Step) -> dict[str, float]:
        now = self.clock()
        share = min(1.0, step.data_seconds / max(1e-9, now - self.stepped_at))
        self.data_wait = share if self.data_wait is None else SMOOTHING * self.data_wait + (1 - SMOOTHING) * share
        self.stepped_at = now
        return {
            "samples_per_second": self.rate.update(training.state.global_step, now) * training.plan.global_batch,
            "memory_gib": peak_memory(training.fabric.device),
            "data_wait": self.data_wait,
        }


def smoothed(before: Tensor | None, loss: Tensor) -> Tensor:
    """Return the smoothed loss after one more step, without reading it; a loss that is not finite does not count."""
    if before is None:
        return loss
    mean = torch.where(before.isfinite(), torch.lerp(loss, before, SMOOTHING), loss)
    return torch.where(loss.isfinite(), mean, before)


def over_processes(training: Training, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the means of every process's scalars, without those that are NaN; all processes must ask."""
    if training.fabric.world_size == 1:
        return {name: float(value) for name, value in values.items()}
    numbers = torch.tensor([float(value) for value in values.values()], device=training.fabric.device)
    gathered: Any = training.fabric.all_gather(numbers)
    return dict(zip(values, gathered.nanmean(0).tolist(), strict=True))


def peak_memory(device: torch.device) -> float:
    """Return the largest memory so far, GiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_bytes() / 2**30


def wandb_logger(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return Lightning's logger to Weights & Biases, writing into the run folder; only the first process uses it."""
    from lightning.pytorch.loggers import WandbLogger

    try:
        return WandbLogger(**{"save_dir": str(folder), "project": "latentsmith", "name": folder.name, **options})
    except ModuleNotFoundError:
        raise BadInput("exp_manager.create_wandb_logger=true: wandb is not installed; pip install wandb") from None
    except TypeError as error:
        raise BadInput(f"exp_manager.wandb_logger_kwargs: {error}") from None
