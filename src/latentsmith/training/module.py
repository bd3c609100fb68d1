"""What every training here shares: counters, optimizer, learning rate, averages, metrics."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from latentsmith.data.loader import to_device

from .clipping import excess, gradient_norm
from .ema import Ema
from .optimizers import Schedule, build_optimizer
from .sharding import shard


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
    once, pictures (height, width, 3): made now and then, for the log to take away.
    """

    values: dict[str, Tensor | float] = field(default_factory=dict)
    micro: dict[str, list[Tensor]] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    last_loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the newest micro batch

    def read(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.values.items()}

    def end_step(self) -> None:
        """The means over the step's micro batches become its values; what is NaN in one of them does not count."""
        self.values |= {name: torch.stack(values).nanmean() for name, values in self.micro.items()}
        self.micro.clear()


class TrainingModule(L.LightningModule):
    """A network with its optimizer, averages and counters. Subclasses give `trained` and `training_step`.

    parts: the networks by the names under which checkpoints keep them; the trained ones among them are in `trained`.
    A step whose gradients are not all finite changes no weight; `skipped_steps` counts them, on the device.
    """

    skipped_steps: Tensor

    def __init__(self, parts: Mapping[str, nn.Module], trained: tuple[str, ...], optimisation: Optimisation):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.trained, self.optimisation = trained, optimisation
        self.progress, self.metrics = Progress(), Metrics()
        self.ema: dict[str, Ema] = {}
        self.averaging: dict[str, Any] = {}
        self.sharded = False
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def keep_averages(self, decay: float, **options) -> None:
        """Start averages of every trained part from its present weights."""
        self.averaging = {"decay": decay, **options}
        self.ema = {name: Ema(self.parts[name], **self.averaging) for name in self.trained}

    def configure_model(self) -> None:
        """Split the trained parts over the processes, where trainer.strategy=model_parallel asks for it."""
        if self.device_mesh is not None and not self.sharded:
            self.sharded = True
            for name in self.trained:
                shard(self.parts[name], self.device_mesh["data_parallel"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages, where there are any, in the place of the trained weights meanwhile."""
        with ExitStack() as stack:
            for name, average in self.ema.items():
                stack.enter_context(average.applied(self.parts[name]))
            yield

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return to_device(batch, device)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Dropout, too, is a function of the seed and the position, not of what ran before."""
        torch.manual_seed(batch["dropout_seed"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called when the weights are on their device and split as they will be, so the averages go there too."""
        if self.ema:
            self.keep_averages(**self.averaging)
        parameters = [p for name in self.trained for p in self.parts[name].parameters() if p.requires_grad]
        scaled = bool(getattr(self.trainer.precision_plugin, "scaler", None)) if self._trainer is not None else False
        return build_optimizer(self.optimisation.name, parameters, fused=not scaled, **self.optimisation.options)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        rate = self.optimisation.options["lr"] * self.optimisation.schedule(self.progress.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # at once, not before the next backward pass: activations and gradients share memory
        self.progress.global_step += 1
        self.progress.consumed_samples += self.optimisation.global_batch
        self.metrics.end_step()
        self.record(lr=rate)
        for name, average in self.ema.items():
            average.update(self.parts[name], self.progress.global_step)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = gradient_norm(gradients)
        self.record(grad_norm=norm)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # skips steps by itself
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler
        if gradient_clip_val and not fused:
            torch._foreach_div_(gradients, excess(norm, gradient_clip_val))
        if not scaler:
            self._skip_unless_finite(optimizer, norm)
        if fused:  # divides as it steps, without a pass of its own over all gradients
            optimizer.grad_scale = excess(norm, gradient_clip_val) if gradient_clip_val else None

    def _skip_unless_finite(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Have the optimizer pass over gradients that are not all finite; a fused one does not wait for the device."""
        bad = ~torch.isfinite(norm)
        self.skipped_steps += bad
        self.record(skipped_steps=self.skipped_steps.clone())
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = None

    def record(self, **scalars: Tensor | float) -> None:
        """Keep scalars of this step for the log."""
        for name, value in scalars.items():
            self.metrics.values[name] = value.detach() if isinstance(value, Tensor) else value

    def record_micro(self, **scalars: Tensor) -> None:
        """Keep scalars of one micro batch; the log has their means over the step."""
        for name, value in scalars.items():
            self.metrics.micro.setdefault(name, []).append(value.detach())
        self.metrics.last_loss = scalars.get("loss", self.metrics.last_loss).detach()


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Something beside the training is written here: if it cannot be (a full disk), that is told, and all goes on."""
    try:
        yield
    except OSError as error:
        print(f"{what} not written ({error.strerror or error}): training goes on", file=sys.stderr, flush=True)


@contextmanager
def frozen(module: TrainingModule) -> Iterator[None]:
    """No gradients and no dropout meanwhile."""
    modes = [(part, part.training) for part in module.parts.values()]
    module.parts.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.train(training)


class StepCallback(L.Callback):
    """A callback that acts when an optimizer step is done, not after each of its micro batches."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module)

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule) -> None:
        raise NotImplementedError
