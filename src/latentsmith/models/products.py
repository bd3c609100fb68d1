"""Matrix products in float32 on a CPU, by the library that is the faster one there.

PyTorch's come from Intel's MKL. On other makers' processors with AVX-512 that stays at half the rate of oneDNN, which
PyTorch ships for its convolutions. The choice depends on the processor and on shapes alone, so a run and its
continuation compute the same; the two agree within rounding.
"""

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WORK = 1 << 22  # multiplications, below which the call costs more than it saves


class Linear(nn.Linear):
    """nn.Linear, by the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, by the faster library: (..., in) times (out, in), plus (out,)."""
    if chooses(input, weight) and onednn_is_faster() and input.numel() * len(weight) >= LEAST_WORK:
        return LinearProduct.apply(input, weight, bias)
    return F.linear(input, weight, bias)


def chooses(input: Tensor, weight: Tensor) -> bool:
    """Whether there is something to choose: device and precision are right, and no compiler is at work."""
    float32 = input.is_cpu and weight.is_cpu and input.dtype == weight.dtype == torch.float32
    return float32 and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


@lru_cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that Intel did not make, and PyTorch has oneDNN for it."""
    return has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not made_by_intel()


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def made_by_intel() -> bool:
    """True, too, where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return "AuthenticAMD" not in said


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, k) times b (k, m), plus bias (m,), outside autograd."""
    if onednn_is_faster() and a.numel() * b.shape[1] >= LEAST_WORK:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a (batch, n, k) times b (batch, k, m), outside autograd."""
    if onednn_is_faster():
        return torch.stack([product(one, other) for one, other in zip(a, b, strict=True)])
    return torch.bmm(a, b)


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (batch, n, m) += a (batch, n, k) times b (batch, k, m)."""
    if onednn_is_faster():
        for into, one, other in zip(total, a, b, strict=True):
            into += product(one, other)
    else:
        total.baddbmm_(a, b)


class LinearProduct(torch.autograd.Function):
    """`linear` and its gradients as products of matrices."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return product(input.flatten(0, -2), weight.t(), bias).view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        d_input = product(rows, weight).view_as(input) if ctx.needs_input_grad[0] else None
        d_weight = product(rows.t(), input.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return d_input, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
