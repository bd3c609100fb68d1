"""Convolutions on a CPU with their weights kept as its kernels want them, instead of reordered at every call."""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from .convolution import CpuConv2d, suits_winograd

TOO_MANY_WEIGHTS = 8  # for every value of a picture, from which on packed ones are faster than transformed ones
PAGEOUT = 21  # Linux' MADV_PAGEOUT: pages of a file are dropped, to be read again when they are needed


class PackedConv2d(CpuConv2d):
    """A convolution that packs its weight at the first call without gradients, unless its shape does better without.

    The weight stays what it was, for reading, saving and changing; a changed one is packed again. Its pages, where they
    are a mapped file's, are given back to the system meanwhile.
    """

    packed: Tensor | None = None
    packed_from: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.chooses(input) or self.does_better_unpacked(input):
            return super().forward(input)
        source = (self.weight.data_ptr(), None if self.weight.is_inference() else self.weight._version)
        input = input.contiguous(memory_format=torch.channels_last)
        geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        if self.packed is None or self.packed_from != source:
            weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(input.shape))
            self.packed_from = source
            give_back(self.weight)
        return torch.ops.mkldnn._convolution_pointwise(input, self.packed, self.bias, *geometry, "none", [], "")

    def does_better_unpacked(self, input: Tensor) -> bool:
        kind = (self.kernel_size, self.stride, self.padding)
        return kind == ((3, 3), (1, 1), (1, 1)) and suits_winograd(input, self.weight, TOO_MANY_WEIGHTS)

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack for themselves: a packed tensor cannot be copied."""
        return {name: value for name, value in super().__getstate__().items() if not name.startswith("packed")}


def can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def give_back(tensor: Tensor) -> None:
    """Ask the system to drop the pages of a tensor, which it does for files; without effect where it cannot."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None and length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), PAGEOUT)
