"""What every training here shares: counters, optimizer, learning rate, averages, metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from .ema import Ema
from .optimizers import Schedule, build_optimizer


@dataclass(frozen=True)
class Optimisation:
    """How the trained parameters move: an optimizer's name and options, and the factor of its `lr` at each step."""

    name: str
    options: Mapping[str, Any]
    schedule: Schedule
    global_batch: int


@dataclass
class Progress:
    """Where a run stands: all that its data and its learning rate depend on."""

    global_step: int = 0  # optimizer steps done
    consumed_samples: int = 0


@dataclass
class Metrics:
    """The newest value of every scalar of training, left on its device until somebody reads it.

    values: of the newest step. micro: those of the step under way, one for each of its micro batches so far.
    """

    values: dict[str, Tensor | float] = field(default_factory=dict)
    micro: dict[str, list[Tensor]] = field(default_factory=dict)

    def read(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.values.items()}

    def end_step(self) -> None:
        """The means over the step's micro batches become its values; what is NaN in one of them does not count."""
        self.values |= {name: torch.stack(values).nanmean() for name, values in self.micro.items()}
        self.micro.clear()


class TrainingModule(L.LightningModule):
    """A network with its optimizer, averages and counters. Subclasses give `trained` and `training_step`.

    parts: the networks by the names under which checkpoints keep them; the trained ones among them are in `trained`.
    """

    def __init__(self, parts: Mapping[str, nn.Module], trained: tuple[str, ...], optimisation: Optimisation):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.trained, self.optimisation = trained, optimisation
        self.progress, self.metrics = Progress(), Metrics()
        self.ema: dict[str, Ema] = {}

    def keep_averages(self, decay: float, **options) -> None:
        """Start averages of every trained part from its present weights."""
        self.ema = {name: Ema(self.parts[name], decay, **options) for name in self.trained}

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Dropout, too, is a function of the seed and the position, not of what ran before."""
        torch.manual_seed(batch["dropout_seed"][0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for name in self.trained for p in self.parts[name].parameters() if p.requires_grad]
        return build_optimizer(self.optimisation.name, parameters, **self.optimisation.options)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        rate = self.optimisation.options["lr"] * self.optimisation.schedule(self.progress.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.progress.global_step += 1
        self.progress.consumed_samples += self.optimisation.global_batch
        self.metrics.end_step()
        self.record(lr=rate)
        for name, average in self.ema.items():
            average.update(self.parts[name], self.progress.global_step)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit = gradient_clip_val or float("inf")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.record(grad_norm=nn.utils.clip_grad_norm_(parameters, limit))

    def record(self, **scalars: Tensor | float) -> None:
        """Keep scalars of this step for the log."""
        for name, value in scalars.items():
            self.metrics.values[name] = value.detach() if isinstance(value, Tensor) else value

    def record_micro(self, **scalars: Tensor) -> None:
        """Keep scalars of one micro batch; the log has their means over the step."""
        for name, value in scalars.items():
            self.metrics.micro.setdefault(name, []).append(value.detach())


class StepCallback(L.Callback):
    """A callback that acts when an optimizer step is done, not after each of its micro batches."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module)

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule) -> None:
        raise NotImplementedError
