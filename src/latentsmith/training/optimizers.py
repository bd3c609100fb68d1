"""Optimizers and learning rates under NeMo's names, and gradient clipping in as few passes over memory as possible."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded, whole

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
STATE_VALUES = {  # values in float32 that an optimizer keeps for a weight, where not two
    "SGD": 0, "RMSprop": 1, "Adagrad": 1, "adamw8bit": 0.5, "paged_adamw8bit": 0.5,
}  # fmt: skip
CHUNK = 1 << 20  # values that one dot product sums in float32: rounding of about a millionth
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

        return getattr(optim, BITSANDBYTES[name])(parameters, **options)
    if name in ("fused_adam", "adamw"):
        return torch.optim.AdamW(parameters, fused=fused, **options)
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optim.name {name!r} is neither fused_adam, adamw nor a class of torch.optim")
    return cls(parameters, **options)  # type: ignore[call-arg]


def lr_schedule(
    name: str, *, warmup_steps: int = 0, hold_steps: float = math.inf, max_steps: int = -1, min_factor: float = 0.0
) -> Schedule:
    """Return the factor of the learning rate as a function of the optimizer steps done.

    constant; WarmupPolicy and WarmupHoldPolicy, which rise linearly as (step + 1) / (warmup_steps + 1) and stay at 1,
    beyond max_steps at min_factor, as NeMo's; linear and CosineAnnealing, which after the same rise and `hold_steps`
    fall to min_factor at max_steps. Raises ValueError for another name, or a falling one without max_steps.
    """
    falls = {"linear": lambda share: 1 - share, "CosineAnnealing": lambda share: (1 + math.cos(math.pi * share)) / 2}
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


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, a scalar; over all processes where they are sharded."""
    plain = all(g.is_cpu and g.dtype == torch.float32 and not is_sharded(g) and _is_dense(g) for g in gradients)
    if not gradients or not plain:
        return whole(nn.utils.get_total_norm(gradients))
    chunks = (chunk for g in gradients for chunk in _flat(g).split(CHUNK))
    return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum().sqrt()  # twice as fast as torch's norms


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """Return the divisor (>= 1) that clips the global gradient norm to `limit`, float32 (Pascanu et al. 2013)."""
    return ((norm.float() + 1e-6) / limit).clamp(min=1.0)


def clip_and_skip(
    optimizer: Any, gradients: Sequence[Tensor], norm: Tensor, limit: float | None, *, scaler: Any = None
) -> None:
    """Clip gradients to a global norm of `limit`, and make the optimizer's next step skip them unless `norm` is finite.

    A fused optimizer divides and skips in its own kernel, without another pass over the gradients and without waiting
    for the device. scaler: a GradScaler, which skips steps by itself.
    """
    divisor = clip_divisor(norm, limit) if limit else None
    if getattr(optimizer, "_step_supports_amp_scaling", False) and scaler is None:
        optimizer.grad_scale, optimizer.found_inf = divisor, (~norm.isfinite()).float()
        return
    if divisor is not None:
        torch._foreach_div_(list(gradients), divisor)
    if scaler is None and not norm.isfinite():
        for parameter in parameters_of(optimizer):
            parameter.grad = None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _flat(tensor: Tensor) -> Tensor:
    """Return the values of a dense tensor in their order in memory."""
    return (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).view(-1)
