"""A validation loss that can be compared between runs and between their steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentsmith.data.loader import Reader, Record, to_device

from .diffusion_module import DiffusionTraining
from .metrics_log import append_row, drop_rows_after
from .module import StepCallback, frozen, tolerated
from .random_draws import ValidationDraws

VALIDATION_FILE = "validation.csv"


@dataclass(frozen=True)
class HeldOut:
    """The samples of a validation: `read(indices, positions)` of a set of `length`, of which `draw.count` are taken,
    evenly spaced, `batch_size` at a time."""

    read: Reader
    draw: ValidationDraws
    length: int
    batch_size: int

    def __getitem__(self, numbers: Sequence[int]) -> Record:
        batch = self.read([number * self.length // self.draw.count for number in numbers], numbers)
        latent_shape = batch.pop("latent_shape", None)
        return {**batch, **self.draw(numbers, latent_shape)}


class Validation(StepCallback):
    """Every `every_n_steps` optimizer steps, and after the last, the mean squared error of the prediction over the held
    out samples, with the trained weights and with their averages: a row of `folder`/validation.csv (`val_loss`,
    `val_loss_ema`) and TensorBoard scalars of the same names.

    Noise and timesteps belong to the sample, dropout is off, captions are never dropped, and neither loss_type nor
    weights enter; so two losses differ only by what the networks predict. Processes share the samples.
    """

    def __init__(self, held_out: HeldOut, folder: Path, every_n_steps: int, max_steps: int):
        self.held_out, self.path = held_out, folder / VALIDATION_FILE
        self.every_n_steps, self.max_steps = every_n_steps, max_steps

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            drop_rows_after(self.path, module.progress.global_step)

    def on_step_end(self, trainer, module) -> None:
        step = module.progress.global_step
        if step % self.every_n_steps == 0 or step == self.max_steps:
            self.run(trainer, module)

    def run(self, trainer: Any, module: DiffusionTraining) -> None:
        """Measure, and write it down."""
        with frozen(module):
            losses = {"val_loss": self.loss(trainer, module)}
            if module.ema:
                with module.averaged():
                    losses["val_loss_ema"] = self.loss(trainer, module)
        if trainer.is_global_zero:
            with tolerated("validation loss"):
                append_row(self.path, {"step": module.progress.global_step, **losses})
            module.metrics.once |= losses

    def loss(self, trainer: Any, module: DiffusionTraining) -> float:
        """The mean over the held out samples."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches(trainer.global_rank, trainer.world_size):
            weights = batch.pop("weight").double()
            given = trainer.precision_plugin.convert_input(batch)  # made outside its context: draws are float32
            with trainer.precision_plugin.forward_context():
                errors = module.losses(to_device(given, module.device), "l2")
            total += (errors.cpu().double() * weights).sum()
        if trainer.world_size > 1:
            gathered: Any = module.all_gather(total.float().to(module.device))
            total = gathered.double().sum().cpu()
        return float(total / self.held_out.draw.count)

    def batches(self, rank: int, processes: int) -> Iterator[Record]:
        """The micro batches of one process. All processes have as many: samples of weight 0 fill up the last."""
        held, count = self.held_out, self.held_out.draw.count
        share = -(-count // processes)
        numbers = [rank + processes * place for place in range(share)]
        for at in range(0, share, held.batch_size):
            taken = numbers[at : at + held.batch_size]
            weight = torch.tensor([float(number < count) for number in taken])
            yield {**held[[min(number, count - 1) for number in taken]], "weight": weight}
