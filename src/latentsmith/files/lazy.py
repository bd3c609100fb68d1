"""Tensors that are still on disk: shape and dtype at once, the numbers mapped from the file when they are asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from .errors import BadInput
from .regular import check_regular


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose numbers come when `read` is called, mapped copy-on-write where the file's layout allows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: "Tensor | LazyTensor") -> "LazyTensor":
        """Return a tensor of either sort as a LazyTensor."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return cls(tensor.dtype, tuple(tensor.shape), tensor.detach)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        """Return zeros that take memory only while they are read."""
        return cls(dtype, tuple(shape), lambda: torch.zeros(shape, dtype=dtype))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to(
        self, dtype: torch.dtype | None, name: str = "a tensor", zeroed: Callable[[int], None] | None = None
    ) -> "LazyTensor":
        """Return the tensor in another dtype; integers, and everything if dtype is None, stay as they are.

        zeroed: called on reading with how many numbers were rounded to 0. Reading raises BadInput, with `name`, for a
        number above the largest of the dtype.
        """
        if dtype is None or not self.dtype.is_floating_point or self.dtype == dtype:
            return self

        def read() -> Tensor:
            wide = self.read()
            rounded = wide.to(dtype)
            if (lost := wide.isfinite() & ~rounded.isfinite()).any():
                title, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
                raise BadInput(f"{name} holds {wide[lost][0]:.7g}, above {limit:.7g}, the largest {title}; take fp32")
            if zeroed and (count := int(wide.count_nonzero() - rounded.count_nonzero())):
                zeroed(count)
            return rounded

        return LazyTensor(dtype, self.shape, read)

    def reshape(self, shape: tuple[int, ...]) -> "LazyTensor":
        """Return the tensor in another shape of as many elements."""
        return self.changed(tuple(shape), lambda tensor: tensor.reshape(shape))

    def to_bytes(self) -> memoryview:
        """Return the numbers in row-major order, little-endian."""
        return self.read().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data

    def changed(self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """Return what `function` will make of the tensor. shape: the result's; its dtype is this tensor's."""
        return LazyTensor(self.dtype, shape, lambda: function(self.read()))


def map_bytes(path: Path, at: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return a 1-D tensor over `size` bytes at `at` of a file, mapped copy-on-write (copied where misaligned)."""
    stat = check_regular(path)
    if at + size > stat.st_size:
        raise BadInput(
            f"{path}: truncated ({stat.st_size:,} bytes, at least {at + size:,} expected); fetch or copy it again"
        )
    if size == 0:
        return torch.empty(0, dtype=dtype)
    window = _mapped(path, stat.st_size, stat.st_mtime_ns)[at : at + size - size % dtype.itemsize]
    return window.view(dtype) if at % dtype.itemsize == 0 else window.clone().view(dtype)


def forget_maps() -> None:
    """Keep no file mapped for the next tensor that is read; those in use stay as they are."""
    _mapped.cache_clear()


@lru_cache(maxsize=8)
def _mapped(path: Path, size: int, _modified: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
