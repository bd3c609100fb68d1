"""The norm of all gradients, and clipping to it, in as few passes over memory as there can be."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .sharding import is_sharded, whole

CHUNK = 1 << 20  # values that one dot product sums in float32: about a millionth of rounding


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all `gradients` together, a scalar; of all processes' where they are sharded."""
    plain = all(g.is_cpu and g.dtype == torch.float32 and not is_sharded(g) and dense(g) for g in gradients)
    if not gradients or not plain:
        return whole(nn.utils.get_total_norm(gradients))
    chunks = (chunk for g in gradients for chunk in flat(g).split(CHUNK))
    return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum().sqrt()  # twice as fast as torch's norms


def excess(norm: Tensor, limit: float) -> Tensor:
    """What gradients of `norm` are divided by to keep to `limit`: 1 or more, float32 (Pascanu et al. 2013)."""
    return ((norm.float() + 1e-6) / limit).clamp(min=1.0)


def dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def flat(tensor: Tensor) -> Tensor:
    """The values of a dense tensor in the order in which they lie."""
    return (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).view(-1)
