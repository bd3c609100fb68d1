"""Steps with a loss or gradient that is not finite: found, described in a file, and ended if they do not end."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.data.loader import RunSamples, to_device
from latentsmith.files.atomic import write_text
from latentsmith.files.tensors import save_safetensors

from ..loop import Step, Training
from ..objectives import Objective
from ..sharding import largest
from ..state import file_name, trained_parameters, trained_state
from . import Hook

FOLDER = "nonfinite"


class TooManyNonFinite(Exception):
    """Training was stopped, its weights as good as before, since step after step gave no finite gradient."""


class DescribeNonFinite(Hook):
    """Writes `folder`/nonfinite/step-N.json for each step without a finite gradient, and the weights beside the first.

    limit: so many in a row end the training (TooManyNonFinite). Where reading a number would make training wait for its
    device, steps are checked every `every_n_steps`, when the log reads them anyway.
    """

    def __init__(self, folder: Path, samples: RunSamples, limit: int, every_n_steps: int):
        self.folder, self.samples, self.limit, self.every_n_steps = folder / FOLDER, samples, limit, every_n_steps
        self.unread: list[tuple[int, Step]] = []
        self.in_row = 0

    def after_step(self, training: Training, step: Step) -> None:
        number = training.state.global_step
        self.unread.append((number, step))
        if training.fabric.device.type == "cpu" or number % self.every_n_steps == 0:
            self.check(training)

    def on_end(self, training: Training) -> None:
        self.check(training)

    def check(self, training: Training) -> None:
        """Read the gradient norms of the steps since the last check."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        norms = torch.stack([torch.as_tensor(step.metrics["grad_norm"]).float() for _, step in unread]).tolist()
        for (number, step), norm in zip(unread, norms, strict=True):
            self.in_row = 0 if math.isfinite(norm) else self.in_row + 1
            if not math.isfinite(norm) and training.state.scaler is None:
                try:
                    self.describe(training, number, step, norm)
                except Exception as error:  # out of memory or disk: no reason to end what only had to skip a step
                    print(f"step {number:,} skipped, and not described: {error}", flush=True)
            if self.in_row >= self.limit:
                reason = (
                    f"{self.in_row} steps in a row without a finite gradient: stopped, the weights from before them "
                    f"are in the last checkpoint; {self.folder} says which samples and layers, and "
                    "`latentsmith train --replay FILE` runs one again"
                )
                training.stop(TooManyNonFinite(reason))

    def describe(self, training: Training, number: int, step: Step, norm: float) -> None:
        """Write what a step was made of, in each process whose loss was bad, or else in the first."""
        fabric = training.fabric
        losses = [float(loss) for loss in step.losses]
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        anywhere = largest(fabric, bool(bad))
        if not bad and (anywhere or not fabric.is_global_zero):
            return
        positions = list(step.positions[bad[0] if bad else 0])
        rank = f"-process-{fabric.global_rank}" if fabric.global_rank else ""
        path = self.folder / f"step-{number:08d}{rank}.json"
        description: dict[str, Any] = {"step": number, "positions": positions, "weights": None}
        first = None
        if not training.state.sharded:  # no process can run shards by itself
            batch = to_device(self.samples[positions], fabric.device)
            with fabric.autocast():
                found = first_bad(training.objective, batch)
            beside = path.with_suffix("")
            if not path.parent.exists():
                for name in training.state.trained:
                    network = training.state.networks[name]
                    save_safetensors(beside / file_name(name, network), trained_state(network))
            first = found["first_bad"] or "its gradient"
            description |= {
                "keys": found["keys"], "timesteps": found["timesteps"], "losses": [repr(loss) for loss in losses],
                "grad_norm": repr(norm), "first_bad": found["first_bad"],
                "weights": beside.name if beside.is_dir() else None,
            }  # fmt: skip
        write_text(path, json.dumps(description, indent=1) + "\n")
        reason = f"{first} is not finite" if first else "not finite"
        print(f"step {number:,} skipped: {reason}; see {path}", flush=True)


def first_bad(objective: Objective, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Run one micro batch forward and backward and find where numbers first stop being finite.

    Returns `loss`, `keys`, `timesteps`, and `first_bad`: "input:NAME", "forward:LAYER", "backward:LAYER" or None. No
    gradient is kept, no weight is changed.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    found = [f"input:{name}" for name, value in tensors.items() if not is_finite(value)]
    torch.manual_seed(batch["dropout_seed"])
    eagerly = torch.compiler.set_stance("force_eager")
    with torch.enable_grad(), eagerly, watched(objective.networks, found.append):
        loss, _ = objective(dict(batch))
        networks: Any = objective.networks
        torch.autograd.grad(loss, trained_parameters(networks, objective.trained), allow_unused=True)
    return {
        "loss": float(loss.detach()),
        "keys": batch["keys"],
        "timesteps": batch["timesteps"].tolist() if "timesteps" in batch else None,
        "first_bad": next(iter(found), None),
    }


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@contextmanager
def watched(networks: nn.Module, report: Callable[[str], None]) -> Iterator[None]:
    """Make every layer (module without modules inside) report outputs and their gradients that are not finite."""

    def watch(name: str) -> Callable[..., None]:
        def check(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if not is_finite(output):
                report(f"forward:{name}")
            if output.requires_grad:
                output.register_hook(lambda gradient: None if is_finite(gradient) else report(f"backward:{name}"))

        return check

    layers = [(name, layer) for name, layer in networks.named_modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
