"""Steps with a loss or gradient that is not finite: found, described in a file, and ended if they do not end."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.data.loader import RunSamples, to_device
from latentsmith.files.atomic import write_text
from latentsmith.files.tensors import save_safetensors

from .module import StepCallback, TrainingModule

FOLDER = "nonfinite"


class TooManyNonFinite(Exception):
    """Training was stopped, its weights as good as before, since step after step gave no finite gradient."""


@dataclass
class Step:
    """What has to be known of a step if it turns out bad: its number and its samples' positions, micro batch by micro
    batch; the losses of those and the norm of the gradient stay on their device."""

    number: int = 0
    positions: list[list[int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | float = 0.0


class WatchNonFinite(StepCallback):
    """Writes `folder`/nonfinite/step-N.json for each step without a finite gradient, and the weights beside the first.

    limit: so many in a row end the training, with a checkpoint; `raise_if_stopped` then says so. Where reading a number
    would make training wait for its device, steps are looked at every `every_n_steps`, when the log reads them anyway.
    """

    def __init__(self, folder: Path, samples: RunSamples, limit: int, every_n_steps: int):
        self.folder, self.samples, self.limit, self.every_n_steps = folder / FOLDER, samples, limit, every_n_steps
        self.now, self.unread = Step(), list[Step]()
        self.in_row, self.stopped = 0, False

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.now.positions.append(batch["positions"])
        self.now.losses.append(module.metrics.last_loss)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer, module) -> None:
        self.now.number, self.now.norm = module.progress.global_step, module.metrics.values["grad_norm"]
        self.unread.append(self.now)
        self.now = Step()
        if module.device.type == "cpu" or module.progress.global_step % self.every_n_steps == 0:
            self.look(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        if self.unread:
            self.look(trainer, module)

    def look(self, trainer: Any, module: TrainingModule) -> None:
        """Read what the steps since the last look have come to."""
        norms = torch.stack([torch.as_tensor(step.norm).float() for step in self.unread]).tolist()
        for step, norm in zip(self.unread, norms, strict=True):
            self.in_row = 0 if math.isfinite(norm) else self.in_row + 1
            if not math.isfinite(norm) and not getattr(trainer.precision_plugin, "scaler", None):
                try:
                    self.describe(module, step, norm)
                except Exception as error:  # out of memory or disk: no reason to end what only had to skip a step
                    print(f"step {step.number:,} skipped, and not described: {error}", flush=True)
            if self.in_row >= self.limit:
                self.stopped = trainer.should_stop = True
        self.unread.clear()

    def describe(self, module: TrainingModule, step: Step, norm: float) -> None:
        """Write what the step was made of, once on each process whose loss was bad, or else on the first."""
        losses = [float(loss) for loss in step.losses]
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        anywhere = module.trainer.strategy.reduce_boolean_decision(bool(bad), all=False)
        if not bad and (anywhere or not module.trainer.is_global_zero):
            return
        positions = step.positions[bad[0] if bad else 0]
        path = self.folder / f"step-{step.number:08d}{rank_of(module)}.json"
        if module.sharded:  # no process can run the network by itself
            write_text(
                path, json.dumps({"step": step.number, "positions": positions, "weights": None}, indent=1) + "\n"
            )
            print(f"step {step.number:,} skipped: not finite; see {path}", flush=True)
            return
        batch = batch_of(self.samples, positions, module.device)
        plugin = module.trainer.precision_plugin
        with plugin.forward_context():
            first = first_bad(module, plugin.convert_input(batch))
        beside = path.with_suffix("")
        weights = beside.name if beside.is_dir() else None
        if not path.parent.exists():
            weights = self.keep_weights(module, beside)
        described = {
            "step": step.number, "positions": positions, "keys": first["keys"], "timesteps": first["timesteps"],
            "losses": [repr(loss) for loss in losses], "grad_norm": repr(norm), "first_bad": first["first_bad"],
            "weights": weights,
        }  # fmt: skip
        write_text(path, json.dumps(described, indent=1) + "\n")
        what = first["first_bad"] or "its gradient"
        print(f"step {step.number:,} skipped: {what} is not finite; see {path}", flush=True)

    def keep_weights(self, module: TrainingModule, folder: Path) -> str:
        for name in module.trained:
            save_safetensors(folder / f"{name}.safetensors", dict(module.parts[name].state_dict()))
        return folder.name

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise TooManyNonFinite(
                f"{self.in_row} steps in a row without a finite gradient: stopped, the weights from before them are in "
                f"the last checkpoint; {self.folder} says which samples and layers, and "
                "`latentsmith train --replay FILE` runs one again"
            )


def rank_of(module: TrainingModule) -> str:
    rank = module.trainer.global_rank
    return f"-process-{rank}" if rank else ""


def batch_of(samples: RunSamples, positions: list[int], device: torch.device) -> dict[str, Any]:
    """The micro batch at these positions, as training sees it."""
    return to_device(samples[positions], device)


def first_bad(module: TrainingModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Run one micro batch forward and backward and say where numbers first stop being finite.

    Returns `loss`, `keys`, `timesteps`, and `first_bad`: "input:NAME", "forward:LAYER", "backward:LAYER" or None. No
    gradient is kept, no weight is changed.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    found = [f"input:{name}" for name, value in tensors.items() if not finite(value)]
    torch.manual_seed(batch["dropout_seed"])
    micro = {name: list(values) for name, values in module.metrics.micro.items()}
    eagerly = torch.compiler.set_stance("force_eager")
    with torch.enable_grad(), eagerly, watched(module.parts, found.append):
        loss: Any = module.training_step(dict(batch), 0)
        moved = [p for name in module.trained for p in module.parts[name].parameters() if p.requires_grad]
        torch.autograd.grad(loss, moved, allow_unused=True)
    module.metrics.micro = micro
    timesteps = batch["timesteps"].tolist() if "timesteps" in batch else None
    return {
        "loss": float(loss.detach()),
        "keys": batch["keys"],
        "timesteps": timesteps,
        "first_bad": next(iter(found), None),
    }


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@contextmanager
def watched(parts: nn.ModuleDict, tell: Callable[[str], None]) -> Iterator[None]:
    """Every layer (module without modules inside) tells of outputs and of their gradients that are not finite."""

    def watch(name: str) -> Callable[..., None]:
        def see(layer: nn.Module, given: Any, output: Any) -> None:
            for tensor in (output,) if isinstance(output, Tensor) else ():
                if not finite(tensor):
                    tell(f"forward:{name}")
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: None if finite(gradient) else tell(f"backward:{name}"))

        return see

    layers = [(name, layer) for name, layer in parts.named_modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
