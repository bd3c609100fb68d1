"""Convolutions that choose their algorithm: where PyTorch's own is slow on a CPU, matrix products take its place.

The choice depends on the processor and on shapes alone, so a run and its continuation compute the same. All three
algorithms agree within rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .products import add_products, batched_product, chooses, linear, product

STRIP = 1 << 20  # transformed values at a time, which stay in a processor's cache; more where weights are larger
MIN_PRODUCTS = 1 << 28  # below which transforming a picture costs more than it saves


@dataclass(frozen=True)
class Limits:
    """Where each algorithm begins to pay, in weights for every value of the picture, and in channels.

    many_weights: moving weights is what costs. too_many_weights: transforming them costs more than it saves.
    min_channels: below which transforming the picture does.
    """

    many_weights: float
    too_many_weights: float
    min_channels: int


LIMITS = {False: Limits(128, 48, 256), True: Limits(20, 20, 512)}  # by whether oneDNN has the faster products


class CpuConv2d(nn.Conv2d):
    """nn.Conv2d; in float32 on a CPU 1x1 and most 3x3 kernels run as the matrix products that suit their shape."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.chooses(input):
            return super().forward(input)
        if self.kernel_size == (1, 1) and self.stride == (1, 1):
            return channels_second(linear(pixels_last(input), self.weight.flatten(1), self.bias))
        if self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1):
            if suits_product(input, self.weight):
                return ProductConvolution.apply(input, self.weight, self.bias)
            if suits_winograd(input, self.weight):
                return WinogradConvolution.apply(input, self.weight, self.bias)
        return super().forward(input.contiguous(memory_format=torch.channels_last))

    def chooses(self, input: Tensor) -> bool:
        """Whether there is something to choose: device, precision and kind are right, and no compiler is at work."""
        simple = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        return simple and chooses(input, self.weight)


def suits_product(input: Tensor, weight: Tensor) -> bool:
    """Few pixels, many weights: products that read the weights as they lie."""
    return weights_a_value(input, weight) >= LIMITS[products.onednn_is_faster()].many_weights


def suits_winograd(input: Tensor, weight: Tensor, too_many: float | None = None) -> bool:
    """Many channels, and enough pixels that fall into tiles of 2 x 2. too_many: weights, in place of the usual limit"""
    limits = LIMITS[products.onednn_is_faster()]
    even = input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0
    large = min(weight.shape[:2]) >= limits.min_channels and input[:, 0].numel() * weight.numel() >= MIN_PRODUCTS
    return even and large and weights_a_value(input, weight) < (too_many or limits.too_many_weights)


def weights_a_value(input: Tensor, weight: Tensor) -> float:
    return weight.numel() / (input[:, 0].numel() * max(weight.shape[:2]))


def pixels_last(image: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, height, width, channels), without moving anything."""
    return image.permute(0, 2, 3, 1)


def channels_second(image: Tensor) -> Tensor:
    """(batch, height, width, channels) -> (batch, channels, height, width), without moving anything."""
    return image.permute(0, 3, 1, 2)


class ProductConvolution(torch.autograd.Function):
    """A 3x3 convolution as one product of the patches of all pixels with the weights (Chellapilla et al. 2006)."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        out = product(patches(input, weight), as_matrix(weight).t(), bias)
        return channels_second(out.view(input.shape[0], *input.shape[2:], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        rows = pixels_last(grad).reshape(-1, grad.shape[1])  # (pixels, out_channels)
        d_input = d_weight = None
        if ctx.needs_input_grad[0]:
            d_input = from_patches(product(rows, as_matrix(weight)), input, weight)
        if ctx.needs_input_grad[1]:
            d_weight = like_weight(product(rows.t(), patches(input, weight)), weight)
        return d_input, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (out, in, 3, 3) as (out, 9 in), in the order in which it lies in memory."""
    return (pixels_last(weight) if is_channels_last(weight) else weight).reshape(weight.shape[0], -1)


def like_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    out, channels = weight.shape[:2]
    if is_channels_last(weight):
        return channels_second(matrix.view(out, 3, 3, channels))
    return matrix.view_as(weight)


def patches(input: Tensor, weight: Tensor) -> Tensor:
    """The 3x3 surroundings of every pixel (batch * height * width, 9 in), in the order of `as_matrix`."""
    columns = F.unfold(input, 3, padding=1).unflatten(1, (-1, 9))  # (batch, in, 9, height * width)
    if is_channels_last(weight):
        columns = columns.transpose(1, 2)
    return columns.flatten(1, 2).transpose(1, 2).reshape(-1, 9 * input.shape[1])


def from_patches(rows: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """The adjoint of `patches`: every pixel's share of its patches, summed up."""
    batch, channels, height, width = input.shape
    columns = rows.view(batch, height * width, -1).transpose(1, 2)
    if is_channels_last(weight):
        columns = columns.unflatten(1, (9, channels)).transpose(1, 2).flatten(1, 2)
    return F.fold(columns, (height, width), 3, padding=1)


# G of Lavin & Gray 2016, section 4.1, F(2x2, 3x3): a kernel's three values along one dimension as a tile's four.
ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], device="cpu")
TILE = torch.kron(ROWS, ROWS)  # (16, 9): a 3x3 kernel, transformed
TURNED = torch.kron(ROWS.flip(1), ROWS.flip(1))  # the same kernel turned by 180 degrees


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution by Winograd's F(2x2, 3x3): 16 products where 36 were (Lavin & Gray 2016)."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return convolved(input, transformed(weight, TILE).transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        d_input = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_input = convolved(grad, transformed(weight, TURNED), None)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(input, grad, weight)
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum((0, 2, 3))
        return d_input, d_weight, d_bias


def transformed(weight: Tensor, by: Tensor) -> Tensor:
    """A weight (out, in, 3, 3) as (16, out, in)."""
    return (by @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])


def convolved(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`input` (batch, in, height, width) convolved with a transformed `weight` (16, in, out)."""
    batch, _, height, width = input.shape
    padded = F.pad(pixels_last(input), (0, 0, 1, 1, 1, 1))
    out = padded.new_empty(batch, height, width, weight.shape[2])
    for images, rows in strips(batch, height // 2, width // 2, weight):
        tiles = spread(padded[images, 2 * rows.start : 2 * rows.stop + 2])
        found = batched_product(tiles.flatten(2, 4).flatten(0, 1), weight)
        gather(found.view(*tiles.shape[:-1], -1), out[images, 2 * rows.start : 2 * rows.stop])
    if bias is not None:
        out += bias
    return channels_second(out)


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight` (out, in, 3, 3) where the convolution's result has `grad`."""
    batch, channels, height, width = input.shape
    padded, grad = F.pad(pixels_last(input), (0, 0, 1, 1, 1, 1)), pixels_last(grad)
    total = padded.new_zeros(16, weight.shape[0], channels)
    for images, rows in strips(batch, height // 2, width // 2, total):
        tiles = spread(padded[images, 2 * rows.start : 2 * rows.stop + 2]).flatten(2, 4).flatten(0, 1)
        wide = widen(grad[images, 2 * rows.start : 2 * rows.stop]).flatten(2, 4).flatten(0, 1)
        add_products(total, wide.transpose(1, 2), tiles)
    flat = (total.view(16, -1).t() @ TILE).view_as(weight)
    return flat.contiguous(memory_format=torch.channels_last) if is_channels_last(weight) else flat


def strips(batch: int, rows: int, columns: int, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of a batch in tiles, as slices of images and of rows of tiles, for a transformed weight (16, ...)."""
    each = max(1, max(STRIP, weight.numel()) // (16 * columns * max(weight.shape[1:])))
    together = max(1, each // rows)
    for image in range(0, batch, together):
        for row in range(0, rows, each):
            yield slice(image, min(image + together, batch)), slice(row, min(row + each, rows))


def spread(padded: Tensor) -> Tensor:
    """Pixels (batch, 2 rows + 2, 2 columns + 2, channels) as tiles (4, 4, batch, rows, columns, channels): B^T d B."""
    batch, height, width, channels = padded.shape
    half = padded.new_empty(4, batch, height // 2 - 1, width, channels)
    four_of_pairs(padded[:, 0::2], padded[:, 1::2], half, 1)
    out = padded.new_empty(4, 4, batch, height // 2 - 1, width // 2 - 1, channels)
    four_of_pairs(half[:, :, :, 0::2], half[:, :, :, 1::2], out.transpose(0, 1), 3)
    return out


def four_of_pairs(even: Tensor, odd: Tensor, out: Tensor, dim: int) -> None:
    """The four values of every tile along one dimension: from pixels 0 and 2, 1 and 2, 2 and 1, 1 and 3 of it."""
    count = even.shape[dim] - 1
    first, third = even.narrow(dim, 0, count), even.narrow(dim, 1, count)
    second, fourth = odd.narrow(dim, 0, count), odd.narrow(dim, 1, count)
    torch.sub(first, third, out=out[0])
    torch.add(second, third, out=out[1])
    torch.sub(third, second, out=out[2])
    torch.sub(second, fourth, out=out[3])


def gather(tiles: Tensor, out: Tensor) -> None:
    """Tiles (4, 4, batch, rows, columns, channels) into pixels (batch, 2 rows, 2 columns, channels): A^T m A."""
    _, _, batch, rows, columns, channels = tiles.shape
    half = tiles.new_empty(2, 4, batch, rows, columns, channels)
    two_of_four(tiles, half[0], half[1])
    pairs = out.unflatten(1, (rows, 2)).unflatten(3, (columns, 2))
    both = pairs.permute(4, 2, 0, 1, 3, 5)  # (column, row, batch, rows, columns, channels)
    two_of_four(half.transpose(0, 1), both[0], both[1])


def two_of_four(tiles: Tensor, first: Tensor, second: Tensor) -> None:
    torch.add(tiles[0], tiles[1], out=first).add_(tiles[2])
    torch.sub(tiles[1], tiles[2], out=second).sub_(tiles[3])


def widen(pixels: Tensor) -> Tensor:
    """Pixels (batch, 2 rows, 2 columns, channels) as tiles, the adjoint of `gather`: A d A^T."""
    batch, height, width, channels = pixels.shape
    half = pixels.new_empty(4, batch, height // 2, width, channels)
    four_of_two(pixels[:, 0::2], pixels[:, 1::2], half)
    out = pixels.new_empty(4, 4, batch, height // 2, width // 2, channels)
    four_of_two(half[:, :, :, 0::2], half[:, :, :, 1::2], out.transpose(0, 1))
    return out


def four_of_two(first: Tensor, second: Tensor, out: Tensor) -> None:
    out[0].copy_(first)
    torch.add(first, second, out=out[1])
    torch.sub(first, second, out=out[2])
    torch.neg(second, out=out[3])
