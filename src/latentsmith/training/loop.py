"""The training loop: batches in, weights out.

What a training step does, networks and libraries apart, is in these files, which set up nothing and write nothing:
    loop.py                the step itself: batch, loss, backward, clip, skip if not finite, step, average, hooks
    objectives.py          a batch -> its loss and metrics
    ../diffusion/loss.py   a prediction -> the loss of each sample
    random_draws.py        noise, timesteps and dropped captions, as functions of the sample's position in the run
    clipping.py            the gradients' norm, clipping to it, skipping
    ema.py                 averages of the weights
    state.py               what a checkpoint keeps
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from latentsmith.data.loader import Record, no_worker_left, to_device

from .clipping import clip_and_skip, gradient_norm, gradients_of
from .hooks import Hook
from .objectives import Objective
from .optimizers import Schedule
from .sharding import fix_bucket_order, leave_group
from .state import TrainingState


@dataclass(frozen=True)
class Plan:
    """Length of a training, samples of a step, and what moves the weights.

    global_batch: samples of one optimizer step over all processes. micro_batch: samples of one forward pass.
    optimizer, options: as model.optim. schedule: steps done -> factor of the learning rate. rate_factor: a parameter's
    name, its network's first -> another factor.
    """

    max_steps: int
    global_batch: int
    micro_batch: int
    optimizer: str
    options: Mapping[str, Any]
    schedule: Schedule
    gradient_clip_val: float | None = None
    rate_factor: Callable[[str], float] = field(default=lambda name: 1.0)


@dataclass
class Step:
    """Inputs and results of one optimizer step. Its tensors stay on their device: reading one waits for the step.

    positions, losses: of each micro batch. metrics: of the whole step. data_seconds: spent waiting for batches.
    """

    positions: list[Sequence[int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    data_seconds: float = 0.0


@dataclass
class Training:
    """A training under way: what the loop and its hooks share. model: the objective as Fabric wrapped it."""

    fabric: Fabric
    objective: Objective
    model: Any
    state: TrainingState
    plan: Plan
    stop_reason: Exception | None = None

    def stop(self, reason: Exception) -> None:
        """End the training after this step, with a checkpoint; `train_loop` then raises the reason."""
        self.stop_reason = self.stop_reason or reason


def train_loop(training: Training, batches: Iterable[Record], hooks: Sequence[Hook]) -> None:
    """Train from where the state's counters stand to plan.max_steps.

    batches: micro batches of this process, from state.consumed_samples on. hooks: in any order.
    """
    state = training.state
    with ExitStack() as closing:
        for hook in hooks:
            closing.callback(hook.close)
            hook.on_start(training)
        training.objective.train()
        with no_worker_left():
            source = fix_bucket_order(training.fabric, training.model, iter(batches))
            while state.global_step < training.plan.max_steps and training.stop_reason is None:
                step = training_step(training, source)
                for hook in hooks:
                    hook.after_step(training, step)
            del source
        for hook in hooks:
            hook.on_end(training)
    leave_group()
    if training.stop_reason is not None:
        raise training.stop_reason


def training_step(training: Training, batches: Iterator[Record]) -> Step:
    """Take one optimizer step on this process's next micro batches."""
    fabric, state, plan, step = training.fabric, training.state, training.plan, Step()
    count = plan.global_batch // (plan.micro_batch * fabric.world_size)
    metrics: dict[str, list[Tensor]] = {}
    for number in range(count):
        started = time.monotonic()
        batch = next(batches)
        step.data_seconds += time.monotonic() - started
        batch = to_device(batch, fabric.device)
        torch.manual_seed(batch["dropout_seed"])  # dropout, too, is a function of the seed and the position
        accumulating = number + 1 < count and not state.sharded  # shards are summed at once: whole ones take memory
        with fabric.no_backward_sync(training.model) if accumulating else nullcontext():
            loss, measured = training.model(batch)
            fabric.backward(loss / count)
        step.positions.append(batch["positions"])
        step.losses.append(loss.detach())
        for name, value in measured.items():
            metrics.setdefault(name, []).append(value.detach())

    rate = plan.options["lr"] * plan.schedule(state.global_step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    fabric.strategy.precision.unscale_gradients(state.optimizer)
    gradients = gradients_of(state.optimizer)
    norm = gradient_norm(gradients)
    finite = norm.isfinite()
    clip_and_skip(state.optimizer, gradients, norm, plan.gradient_clip_val, scaler=state.scaler)
    fabric.strategy.optimizer_step(state.optimizer)
    state.optimizer.zero_grad()  # at once, not before the next backward pass: activations and gradients share memory
    state.global_step += 1
    state.consumed_samples += plan.global_batch
    for name, average in state.ema.items():
        average.update(state.networks[name], state.global_step, finite)

    step.metrics = {name: torch.stack(values).nanmean() for name, values in metrics.items()}
    step.metrics |= {"grad_norm": norm, "lr": rate}
    if state.scaler is None:  # a scaler skips steps as it looks for its scale; these are no faults
        state.skipped_steps += ~finite
        step.metrics["skipped_steps"] = state.skipped_steps.clone()
    return step
