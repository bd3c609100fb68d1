"""A validation loss that can be compared between runs and between their steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.data.loader import Reader, Record, Shape, to_device
from latentsmith.data.shuffle import shuffled_index
from latentsmith.diffusion import NoiseSchedule

from ..loop import Step, Training
from ..metrics_log import append_row, drop_rows_after
from ..objectives import DiffusionObjective
from ..random_draws import DiffusionDraws
from . import Hook, evaluating, log_os_errors
from .metrics import Metrics

VALIDATION_FILE = "validation.csv"
VALIDATION_SEED = 20230501  # of every validation loss, so that runs can be compared


@dataclass(frozen=True)
class ValidationDraws:
    """Noise and timesteps of the validation loss for samples `numbers` of `count`: the same in every run.

    The timesteps are stratified: each `count`-th part of the schedule has one sample, in a shuffled order. Nothing is
    dropped or perturbed. latent_shape, schedule: as of `DiffusionDraws`.
    """

    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    count: int

    def __call__(self, numbers: Sequence[int], latent_shape: Shape | None = None) -> dict[str, Tensor]:
        strata = torch.tensor([shuffled_index(VALIDATION_SEED, number, self.count) for number in numbers])
        timesteps = (2 * strata + 1) * self.schedule.timesteps // (2 * self.count)
        drawn = DiffusionDraws(VALIDATION_SEED, self.latent_shape, self.schedule)(numbers, latent_shape)
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return drawn | {"timesteps": timesteps} | dict(zip(names, self.schedule.coefficients(timesteps), strict=True))


@dataclass(frozen=True)
class HeldOut:
    """The samples of a validation: draw.count of them, evenly spaced in a set of `length`, `batch_size` at a time.

    read(indices, positions): the samples of the set.
    """

    read: Reader
    draw: ValidationDraws
    length: int
    batch_size: int

    def __getitem__(self, numbers: Sequence[int]) -> Record:
        batch = self.read([number * self.length // self.draw.count for number in numbers], numbers)
        latent_shape = batch.pop("latent_shape", None)
        return {**batch, **self.draw(numbers, latent_shape)}

    def batches(self, rank: int, processes: int) -> Iterator[Record]:
        """Yield the micro batches of one process. All have as many: samples of weight 0 fill up the last."""
        count = self.draw.count
        share = -(-count // processes)
        numbers = [rank + processes * number for number in range(share)]
        for at in range(0, share, self.batch_size):
            taken = numbers[at : at + self.batch_size]
            weight = torch.tensor([float(number < count) for number in taken])
            yield {**self[[min(number, count - 1) for number in taken]], "weight": weight}


class Validation(Hook):
    """Measures the mean squared error of the prediction over the held-out samples.

    Every `every_n_steps` optimizer steps, and after the last, with the trained weights and with their averages: a row
    of `folder`/validation.csv (`val_loss`, `val_loss_ema`) and scalars of the same names.
    Noise and timesteps belong to the sample, dropout is off, captions are never dropped, and neither loss_type nor
    weights enter; so two losses differ only by what the networks predict. Processes share the samples.
    """

    def __init__(self, held_out: HeldOut, folder: Path, every_n_steps: int, log: Metrics):
        self.held_out, self.path, self.every_n_steps, self.log = held_out, folder / VALIDATION_FILE, every_n_steps, log

    def on_start(self, training: Training) -> None:
        if training.fabric.is_global_zero:
            drop_rows_after(self.path, training.state.global_step)

    def after_step(self, training: Training, step: Step) -> None:
        number = training.state.global_step
        if number % self.every_n_steps and number != training.plan.max_steps:
            return
        with evaluating(training.objective), training.state.for_evaluation():
            losses = {"val_loss": self.loss(training)}
            if training.state.ema:
                with training.state.averaged():
                    losses["val_loss_ema"] = self.loss(training)
        if training.fabric.is_global_zero:
            with log_os_errors("validation loss"):
                append_row(self.path, {"step": number, **losses})
            self.log.scalars(losses, number)

    def loss(self, training: Training) -> float:
        """Return the mean over the held-out samples."""
        fabric, objective = training.fabric, training.objective
        assert isinstance(objective, DiffusionObjective)
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.held_out.batches(fabric.global_rank, fabric.world_size):
            weights = batch.pop("weight").double()
            with fabric.autocast():
                errors = objective.losses(to_device(batch, fabric.device), "l2")
            total += (errors.cpu().double() * weights).sum()
        if fabric.world_size > 1:
            gathered: Any = fabric.all_gather(total.float().to(fabric.device))
            total = gathered.double().sum().cpu()
        return float(total / self.held_out.draw.count)
