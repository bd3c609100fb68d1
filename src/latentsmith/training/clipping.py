"""Gradient clipping, and skipping of steps that are not finite, in as few passes over memory as possible."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded, whole

CHUNK = 1 << 20  # values that one dot product sums in float32: rounding of about a millionth


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
