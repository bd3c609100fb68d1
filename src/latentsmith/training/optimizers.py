"""Optimizers and learning rates, under NeMo's names."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
STATE_VALUES = {  # values in float32 that an optimizer keeps for a weight, where not two
    "SGD": 0, "RMSprop": 1, "Adagrad": 1, "adamw8bit": 0.5, "paged_adamw8bit": 0.5,
}  # fmt: skip
Schedule = Callable[[int], float]  # optimizer steps done so far -> factor of the learning rate


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, fused: bool = True, **options: Any
) -> torch.optim.Optimizer:
    """Return the optimizer of a name in model.optim.name; options that it lacks are errors.

    name: `fused_adam` or `adamw` (AdamW in one kernel), one of BITSANDBYTES if that is installed (moments in 8 bits;
    paged ones may leave a full GPU for the CPU's memory), or any class of torch.optim.
    fused: False where a GradScaler scales gradients: a fused optimizer unscales them itself, after clipping.
    """
    if name in BITSANDBYTES:
        from bitsandbytes import optim

        made: torch.optim.Optimizer = getattr(optim, BITSANDBYTES[name])(parameters, **options)
        return made
    if name in ("fused_adam", "adamw"):
        return torch.optim.AdamW(parameters, fused=fused, **options)
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optim.name {name!r} is neither fused_adam, adamw nor a class of torch.optim")
    return cls(parameters, **options)


@torch.no_grad()
def share_rounded_away(parameters: Iterable[nn.Parameter], step: float, dtype: torch.dtype) -> float:
    """Return the share of weights that a step of this size, up or down, leaves as they are when kept in `dtype`."""
    lost = total = 0
    for parameter in parameters:
        weight = parameter.to(dtype).float()
        moved = [(weight + change).to(dtype) != weight for change in (step, -step)]
        lost += int((~(moved[0] | moved[1])).sum())
        total += weight.numel()
    return lost / max(1, total)


def lr_schedule(
    name: str, *, warmup_steps: int = 0, hold_steps: float = math.inf, max_steps: int = -1, min_factor: float = 0.0
) -> Schedule:
    """Return the factor of the learning rate as a function of the optimizer steps done.

    constant; WarmupPolicy and WarmupHoldPolicy, which rise linearly as (step + 1) / (warmup_steps + 1) and stay at 1,
    beyond max_steps at min_factor, as NeMo's; linear and CosineAnnealing, which after the same rise and `hold_steps`
    fall to min_factor at max_steps. Raises ValueError for another name, or a falling one without max_steps.
    """
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda share: 1 - share,
        "CosineAnnealing": lambda share: (1 + math.cos(math.pi * share)) / 2,
    }
    if name not in ("constant", "WarmupPolicy", "WarmupHoldPolicy", *falls):
        raise ValueError(f"optim.sched.name {name!r} is not a schedule")
    if name in falls and max_steps <= 0:
        raise ValueError(f"optim.sched.name {name} needs max_steps")

    def factor(step: int) -> float:
        if name != "constant" and step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name not in falls:
            return min_factor if name != "constant" and 0 < max_steps < step else 1.0
        start = warmup_steps + (hold_steps if math.isfinite(hold_steps) else 0)
        share = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
        return min_factor + (1 - min_factor) * falls[name](share)

    return factor
