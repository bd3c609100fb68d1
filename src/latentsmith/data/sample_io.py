"""The members of a sample: its picture, its caption, its arrays."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from math import prod
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput

from .errors import BadSample
from .shards import Sample, Shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm")
CAPTION_EXTENSIONS = ("txt", "caption")
MAGIC = b"\x93NUMPY\x01\x00"


def image_member(sample: Sample) -> tuple[str, memoryview]:
    """Extension and bytes of a sample's picture. Raises BadSample if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return extension, sample.members[extension]
    raise BadSample("missing image", f"members {', '.join(sample.members)}, none an image")


@contextmanager
def named(shard: Shard, sample: Sample) -> Iterator[None]:
    """A BadSample of this sample as BadInput that names shard and key: it was good when it was imported."""
    try:
        yield
    except BadSample as error:
        raise BadInput(f"{shard.path}: sample {sample.key!r}: {error}; import the set again") from None


def caption_of(shard: Shard, sample: Sample) -> str:
    """A sample's caption; BadInput, naming shard and key, if it has none."""
    for extension in CAPTION_EXTENSIONS:
        if extension in sample.members:
            return sample.text(extension)
    raise BadInput(f"{shard.path}: sample {sample.key!r} has no .txt caption; import the set first")


def array_of(shard: Shard, sample: Sample, extension: str) -> np.ndarray:
    """A .npy member of a sample as a read-only view of its bytes; BadInput if there is no such array."""
    try:
        data = sample.members[extension]
        start = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape = parsed_header(bytes(data[:start]))
        return np.frombuffer(data, dtype, prod(shape), start).reshape(shape)
    except KeyError:
        raise BadInput(f"{shard.path}: sample {sample.key!r} has no .{extension} member") from None
    except ValueError as error:
        raise BadInput(f"{shard.path}: {sample.key}.{extension} is not a plain array ({error})") from None


class Column:
    """`rows`, (count, ...): one array of each of several samples, of the shape and dtype of `first`, a file of which
    has `head` bytes before its numbers."""

    def __init__(self, count: int, first: np.ndarray, head: int):
        self.rows = np.empty((count, *first.shape), first.dtype)
        self.kind, self.nbytes = (first.dtype, first.shape), first.nbytes
        self.flat = self.rows.reshape(-1).view(np.uint8).data
        self.head, self.good_head = bytearray(head), b""

    def place(self, row: int) -> memoryview:
        """Where the numbers of a row belong."""
        return self.flat[row * self.nbytes : (row + 1) * self.nbytes]

    def head_fits(self) -> bool:
        """Whether what was read into `head` says that these numbers are of this shape and dtype."""
        if self.head != self.good_head:
            with suppress(ValueError):
                whole = 10 + int.from_bytes(self.head[8:10], "little") == len(self.head)
                if whole and parsed_header(bytes(self.head)) == self.kind:
                    self.good_head = bytes(self.head)
        return self.head == self.good_head

    def take(self, row: int, held: np.ndarray, what: str) -> None:
        """Copy an array that was read otherwise; ValueError naming `what` if its shape or dtype are others."""
        if (held.dtype, held.shape) != self.kind:
            now, wanted = f"{held.dtype} {held.shape}", f"{self.kind[0]} {self.kind[1]}"
            raise ValueError(f"{what} has not the same shape and type: {now}, not {wanted}")
        self.rows[row] = held


def parsed_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape from the header of a .npy file; ValueError if it is none, or of Fortran order or objects."""
    if header not in _HEADERS:
        if header[:8] != MAGIC:
            raise ValueError("no .npy header of version 1")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(header[8:]))
        if fortran or dtype.hasobject:
            raise ValueError("Fortran order or Python objects")
        _HEADERS[header] = dtype, shape
    return _HEADERS[header]


_HEADERS: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}  # a cache has one header per shape: each is parsed once


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_float16(values: Any, what: str) -> np.ndarray:
    """Values as float16; BadInput, naming `what`, if one is not finite or over 65,504."""
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float16)
    if not np.isfinite(array).all():
        raise BadInput(f"{what}: its encoding is not finite in float16; check the encoder's weights and precision")
    return array
