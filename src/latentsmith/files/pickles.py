"""Pickles of plain containers and NumPy arrays, read without ever running what a pickle asks for."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import BadInput

ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


def check_opcodes(path: Path | str, data: bytes) -> None:
    """Refuse opcodes that get round an unpickler: EXT skips find_class once cached, a huge memo index takes gigabytes.

    path: names the data in messages. Raises BadInput.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and int(argument or 0) > len(data)):
            raise BadInput(f"{path}: its pickle uses {opcode.name} as no file of weights or arrays does; refused")


def load_arrays(data: bytes | memoryview, what: str) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, text, numbers and arrays of numbers.

    what: names the data in messages. Raises BadInput for a pickle that asks for anything else, or is none.
    """
    return _load(_ArrayUnpickler, bytes(data), what)


def load_plain(data: bytes, what: str) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, text and numbers. Raises BadInput as `load_arrays`."""
    return _load(_PlainUnpickler, data, what)


def _load(unpickler: type["_PlainUnpickler"], data: bytes, what: str) -> Any:
    try:
        check_opcodes(what, data)
        return unpickler(io.BytesIO(data), encoding="latin1").load()
    except BadInput:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise BadInput(f"{what}: cannot be read as a pickle of {unpickler.holds}: {error}"[:300]) from None


class _PlainUnpickler(pickle.Unpickler):
    holds = "plain values"

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; refused")


class _ArrayUnpickler(_PlainUnpickler):
    holds = "arrays"

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "numpy.ndarray":
            return np.ndarray
        if full == "numpy.dtype":
            return _number_dtype
        if module in ARRAY_MODULES and name in ("_reconstruct", "_frombuffer"):
            return _empty if name == "_reconstruct" else _from_buffer
        if full == "_codecs.encode":  # how the bytes of an array are spelt in protocols 0 to 2
            return _latin1
        return super().find_class(module, name)


def _number_dtype(code: Any, *flags: Any) -> np.dtype:
    dtype: np.dtype = np.dtype(code)
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of {dtype}, not of numbers")
    return dtype


def _empty(_class: Any, _shape: Any, _code: Any) -> np.ndarray:
    """Return the array that a pickle then fills: its state brings shape, dtype and numbers."""
    return np.ndarray((0,), "b")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    array: np.ndarray = np.frombuffer(buffer, dtype)
    return array.reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in {encoding}")
    return text.encode("latin1")
