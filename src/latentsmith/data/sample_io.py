"""The members of a sample: its image, its caption, its arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput
from latentsmith.files.images import is_image

from .errors import BadSample
from .shards import Sample

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"),
    *(
        "jfif",
        "jpe",
        "jif",
        "jfi",
        "jpg_large",
        "apng",
        "dib",
        "mpo",
        "j2k",
        "j2c",
        "jpx",
        "jpf",
        "pbm",
        "pnm",
        "avifs",
    ),
    *("heic", "heif", "hif", "jxl", "psd"),  # named where nothing here reads them
)
CAPTION_EXTENSIONS = ("txt", "caption")
NPY_HEADERS = {  # by version: bytes of the header's length, and NumPy's reader
    1: (2, np.lib.format.read_array_header_1_0),
    2: (4, np.lib.format.read_array_header_2_0),
}


def image_member(sample: Sample) -> tuple[str, memoryview]:
    """Return extension and bytes of a sample's image: by its extension, or else by its content.

    Raises BadSample if it has none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return extension, sample.members[extension]
    for extension, data in sample.members.items():
        if "." not in extension and is_image(data):
            return extension, data
    dotted = any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in sample.members)
    cause = (
        "an extension begins at the first dot of a name" if dotted else "its other members may lie elsewhere in the tar"
    )
    raise BadSample("missing image", f"members {', '.join(sample.members)}, none an image; {cause}")


@contextmanager
def blaming_sample(sample: Sample) -> Iterator[None]:
    """Raise a BadSample as BadInput that names tar and key: the sample was good when it was imported."""
    try:
        yield
    except BadSample as error:
        raise BadInput(f"{sample}: {error}; import the set again") from None


def caption_of(sample: Sample) -> str:
    """Return a sample's caption. Raises BadInput, naming tar and key, if it has none."""
    for extension in CAPTION_EXTENSIONS:
        if extension in sample.members:
            return sample.text(extension)
    raise BadInput(f"{sample} has no .txt caption; import the set first")


def array_of(sample: Sample, extension: str) -> np.ndarray:
    """Return a .npy member of a sample as a read-only view of its bytes. Raises BadInput if there is no such array."""
    try:
        return npy_array(sample.members[extension])
    except KeyError:
        raise BadInput(f"{sample} has no .{extension} member") from None
    except ValueError as error:
        raise BadInput(f"{sample}: .{extension} is not a plain array ({error})") from None


def npy_array(data: bytes | memoryview) -> np.ndarray:
    """Return the array in the bytes of a .npy file as a view of them. Raises ValueError if it is no plain array."""
    if len(data) < 12 or data[6] not in NPY_HEADERS:
        raise ValueError("no .npy header of version 1 or 2")
    start = 8 + NPY_HEADERS[data[6]][0]
    start += int.from_bytes(data[8:start], "little")
    dtype, shape = _parsed_header(bytes(data[:start]))
    return np.frombuffer(data, dtype, prod(shape), start).reshape(shape)


@lru_cache(maxsize=256)  # a cache has one header for each shape
def _parsed_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    file = BytesIO(header)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = NPY_HEADERS[header[6]][1](file)
    if fortran or dtype.hasobject:
        raise ValueError("Fortran order or Python objects")
    return dtype, shape


def npy_bytes(array: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy file."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_float16(values: Any, what: str) -> np.ndarray:
    """Return values as float16; BadInput, naming `what`, if one is not finite or over 65,504."""
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float16)
    if not np.isfinite(array).all():
        raise BadInput(f"{what}: its encoding is not finite in float16; check the encoder's weights and precision")
    return array
