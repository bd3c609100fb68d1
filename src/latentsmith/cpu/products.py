"""Matrix products in float32 on a CPU, by the library that is the faster one there.

PyTorch's come from Intel's MKL. On AMD's processors with AVX-512 that stays at half the rate of oneDNN, which PyTorch
ships for its convolutions. The choice depends on processor and shapes alone, so that a resumed run computes the same.
"""

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WORK = 1 << 22  # multiplications, below which the call costs more than it saves


class CpuLinear(nn.Linear):
    """nn.Linear, by the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute F.linear by the faster library: (..., in) times (out, in), plus (out,)."""
    if is_plain_float32(input, weight) and onednn_is_faster() and input.numel() * len(weight) >= LEAST_WORK:
        apply: Callable[..., Tensor] = LinearProduct.apply
        rows = apply(input.reshape(-1, input.shape[-1]), weight, bias)
        return rows.view(*input.shape[:-1], len(weight))
    return F.linear(input, weight, bias)


def is_plain_float32(input: Tensor, weight: Tensor) -> bool:
    """Return whether both are plain float32 tensors (not fake or sharded) on a CPU, outside autocast and compilers."""
    plain = {type(input), type(weight)} <= {Tensor, nn.Parameter} and input.is_cpu and weight.is_cpu
    float32 = plain and input.dtype == weight.dtype == torch.float32
    return float32 and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


@lru_cache
def onednn_is_faster() -> bool:
    """Return whether this is a processor of AMD's with AVX-512, and PyTorch has oneDNN for it."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in processor


def has_onednn() -> bool:
    operations = ("_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operations)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply a (n, k) times b (k, m), plus bias (m,), outside autograd."""
    if onednn_is_faster() and a.numel() * b.shape[1] >= LEAST_WORK:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(dense(a), dense(b).t(), bias, "none", [], "")
        return made
    return a @ b if bias is None else torch.addmm(bias, a, b)


def dense(matrix: Tensor) -> Tensor:
    """Return the matrix without gaps or repeats in memory: a copy unless its rows or columns follow each other."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (batch, n, k) times b (batch, k, m), outside autograd."""
    return torch.stack([product(*pair) for pair in zip(a, b, strict=True)]) if onednn_is_faster() else torch.bmm(a, b)


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add to total (batch, n, m) a (batch, n, k) times b (batch, k, m)."""
    if not onednn_is_faster():
        total.baddbmm_(a, b)  # a fifth faster than 16 products of MKL's
        return
    for into, *pair in zip(total, a, b, strict=True):
        into += product(*pair)


class LinearProduct(torch.autograd.Function):
    """`linear` of a matrix (n, in), and its gradients, as products."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)
        return product(input, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        d_input = product(grad, weight) if of_input else None
        d_weight = product(grad.t(), input) if of_weight else None
        return d_input, d_weight, grad.sum(0) if of_bias else None
