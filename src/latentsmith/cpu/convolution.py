"""Convolutions that choose their algorithm: where PyTorch's own is slow on a CPU, matrix products take its place.

The choice depends on processor and shapes alone, so that a resumed run computes the same; all agree within rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .allocator import drop_pages
from .products import add_products, batched_product, is_plain_float32, linear

STRIP = 1 << 20  # transformed values at a time, which stay in a processor's cache; more where weights are larger
PACKED_FROM = 8  # weights per value of the image, from which on packed ones are faster than transformed ones
MIN_PRODUCTS = 1 << 28  # below which transforming an image costs more than it saves


@dataclass(frozen=True)
class KernelThresholds:
    """Sizes from which each algorithm pays, in weights per value of the image, and in channels.

    many_weights: moving the weights costs most. too_many_weights: transforming them costs more than it saves.
    min_channels: with fewer, transforming the image does.
    """

    many_weights: float
    too_many_weights: float
    min_channels: int


# By whether oneDNN's products are the faster ones.
THRESHOLDS = {False: KernelThresholds(128, 48, 256), True: KernelThresholds(20, 20, 512)}


class CpuConv2d(nn.Conv2d):
    """nn.Conv2d; in float32 on a CPU 1x1 and most 3x3 kernels run as the matrix products that suit their shape."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.may_choose(input):
            return super().forward(input)
        if self.kernel_size == (1, 1) and self.stride == (1, 1):
            return linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if self.is_same_size_3x3:
            if weights_per_value(input, self.weight) >= THRESHOLDS[products.onednn_is_faster()].many_weights:
                return product_convolution(input, self.weight, self.bias)
            if suits_winograd(input, self.weight):
                apply: Callable[..., Tensor] = WinogradConvolution.apply
                return apply(input, self.weight, self.bias)
        return super().forward(input.contiguous(memory_format=torch.channels_last))

    def may_choose(self, input: Tensor) -> bool:
        """Return whether device, precision and options allow other algorithms than PyTorch's."""
        simple = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        return simple and is_plain_float32(input, self.weight)

    @property
    def is_same_size_3x3(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)


class PackedConv2d(CpuConv2d):
    """A convolution that packs its weight at the first call without gradients, unless its shape does better without.

    The weight stays, for reading, saving and changing; a changed one is packed again. Pages mapped from a file are
    dropped meanwhile.
    """

    packed: Tensor | None = None
    packed_from: Any = None

    def forward(self, input: Tensor) -> Tensor:
        transform = self.is_same_size_3x3 and suits_winograd(input, self.weight, PACKED_FROM)
        if torch.is_grad_enabled() or transform or not self.may_choose(input):
            return super().forward(input)
        source = (self.weight.data_ptr(), None if self.weight.is_inference() else self.weight._version)
        input = input.contiguous(memory_format=torch.channels_last)
        geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        if self.packed is None or self.packed_from != source:
            weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(input.shape))
            self.packed_from = source
            drop_pages(self.weight.data_ptr(), self.weight.nbytes)
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(input, self.packed, self.bias, *geometry, "none", [], "")
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack for themselves: a packed tensor cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("packed")}


def suits_winograd(input: Tensor, weight: Tensor, too_many_weights: float | None = None) -> bool:
    """Return whether there are many channels and enough pixels, in tiles of 2 x 2. too_many_weights: another limit."""
    thresholds = THRESHOLDS[products.onednn_is_faster()]
    even = input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0
    large = min(weight.shape[:2]) >= thresholds.min_channels and input[:, 0].numel() * weight.numel() >= MIN_PRODUCTS
    return even and large and weights_per_value(input, weight) < (too_many_weights or thresholds.too_many_weights)


def weights_per_value(input: Tensor, weight: Tensor) -> float:
    return weight.numel() / (input[:, 0].numel() * max(weight.shape[:2]))


def is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def product_convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 3x3 convolution as one product of the patches of all pixels with the weights (Chellapilla et al. 2006).

    The weights are read in the order in which they lie in memory, and their gradients come in it.
    """
    patches = F.unfold(input, 3, padding=1).unflatten(1, (-1, 9))  # (batch, in, 9, height * width)
    if is_channels_last(weight):
        patches, weight = patches.transpose(1, 2), weight.permute(0, 2, 3, 1)
    rows = patches.flatten(1, 2).transpose(1, 2)  # (batch, height * width, 9 in)
    made: Tensor = linear(rows, weight.flatten(1), bias).transpose(1, 2).unflatten(2, input.shape[2:])
    return made


# F(2x2, 3x3) of Lavin & Gray 2016, section 4.1, along one dimension: G, B^T, A^T and A.
KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
GRAD = ((1, 0), (1, 1), (1, -1), (0, -1))


@lru_cache
def kernel_transform(*, turned: bool = False) -> Tensor:
    """Return (16, 9): a 3x3 kernel, or the same turned by 180 degrees, to a tile of 4 x 4."""
    rows = torch.tensor([row[::-1] if turned else row for row in KERNEL], device="cpu")
    return torch.kron(rows, rows)


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution by Winograd's F(2x2, 3x3): 16 products where 36 were (Lavin & Gray 2016)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return convolved(input, transformed(weight, kernel_transform()).transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        turned = kernel_transform(turned=True)
        d_input = convolved(grad, transformed(weight, turned), None) if of_input else None
        d_weight = weight_gradient(input, grad, weight) if of_weight else None
        return d_input, d_weight, grad.sum((0, 2, 3)) if of_bias else None


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return a weight (out, in, 3, 3) as (16, out, in)."""
    return (matrix @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])


def convolved(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `input` (batch, in, height, width) convolved with a transformed `weight` (16, in, out)."""
    batch, _, height, width = input.shape
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    out = padded.new_empty(batch, height, width, weight.shape[2])
    for images, rows in strips(batch, height // 2, width // 2, weight):
        tiles = winograd_input(padded[images, 2 * rows.start : 2 * rows.stop + 2])
        found = batched_product(tiles.flatten(2, 4).flatten(0, 1), weight)
        winograd_output(found.view(*tiles.shape[:-1], -1), out[images, 2 * rows.start : 2 * rows.stop])
    if bias is not None:
        out += bias
    return out.permute(0, 3, 1, 2)


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `weight` (out, in, 3, 3) where the convolution's result has `grad`."""
    batch, channels, height, width = input.shape
    padded, grad = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)), grad.permute(0, 2, 3, 1)
    total = padded.new_zeros(16, weight.shape[0], channels)
    for images, rows in strips(batch, height // 2, width // 2, total):
        tiles = winograd_input(padded[images, 2 * rows.start : 2 * rows.stop + 2]).flatten(2, 4).flatten(0, 1)
        wide = winograd_grad(grad[images, 2 * rows.start : 2 * rows.stop]).flatten(2, 4).flatten(0, 1)
        add_products(total, wide.transpose(1, 2), tiles)
    flat = (total.view(16, -1).t() @ kernel_transform()).view_as(weight)
    return flat.contiguous(memory_format=torch.channels_last) if is_channels_last(weight) else flat


def strips(batch: int, rows: int, columns: int, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield parts of a batch in tiles, as slices of images and of rows of tiles, for a transformed weight (16, ...)."""
    each = max(1, max(STRIP, weight.numel()) // (16 * columns * max(weight.shape[1:])))
    together = max(1, each // rows)
    for image in range(0, batch, together):
        for row in range(0, rows, each):
            yield slice(image, min(image + together, batch)), slice(row, min(row + each, rows))


def winograd_input(padded: Tensor) -> Tensor:
    """Turn pixels (batch, 2 rows + 2, 2 columns + 2, channels) into tiles (4, 4, batch, rows, columns, channels)."""
    batch, height, width, channels = padded.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    half = padded.new_empty(4, batch, rows, width, channels)
    combine(INPUT, [padded[:, i : i + 2 * rows : 2] for i in range(4)], half)
    out = padded.new_empty(4, 4, batch, rows, columns, channels)
    combine(INPUT, [half[:, :, :, i : i + 2 * columns : 2] for i in range(4)], out.transpose(0, 1))
    return out


def winograd_output(tiles: Tensor, out: Tensor) -> None:
    """Write tiles (4, 4, batch, rows, columns, channels) into pixels (batch, 2 rows, 2 columns, channels): A^T m A."""
    rows, columns = tiles.shape[3:5]
    half = tiles.new_empty(2, *tiles.shape[1:])
    combine(OUTPUT, tiles, half)
    pixels = out.unflatten(1, (rows, 2)).unflatten(3, (columns, 2))  # (batch, rows, 2, columns, 2, channels)
    combine(OUTPUT, half.transpose(0, 1), pixels.permute(4, 2, 0, 1, 3, 5))


def winograd_grad(pixels: Tensor) -> Tensor:
    """Turn pixels (batch, 2 rows, 2 columns, channels) into tiles, the adjoint of winograd_output: A d A^T."""
    batch, height, width, channels = pixels.shape
    half = pixels.new_empty(4, batch, height // 2, width, channels)
    combine(GRAD, [pixels[:, i::2] for i in range(2)], half)
    out = pixels.new_empty(4, 4, batch, height // 2, width // 2, channels)
    combine(GRAD, [half[:, :, :, i::2] for i in range(2)], out.transpose(0, 1))
    return out


def combine(matrix: Sequence[Sequence[int]], parts: Sequence[Tensor] | Tensor, out: Tensor) -> None:
    """Write sum_j matrix[i][j] * parts[j] to out[i], without temporary tensors."""
    for row, target in zip(matrix, out, strict=True):
        terms = sorted(((sign, part) for sign, part in zip(row, parts, strict=True) if sign), key=lambda term: -term[0])
        if len(terms) == 1:
            torch.mul(terms[0][1], terms[0][0], out=target)
            continue
        (_, first), (sign, second), *rest = terms  # every row of several terms has one of sign 1
        torch.add(first, second, alpha=sign, out=target)
        for sign, part in rest:
            target.add_(part, alpha=sign)
