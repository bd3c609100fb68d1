"""Read torch's zip files of pickled tensors without running what a pickle asks for; write them one tensor at a time.

The unpickler knows a handful of names that build tensors and a fixed list of inert ones (configs and trainer objects
that Lightning and NeMo store beside the weights). Inert names become placeholders whose real class is never imported.
Any other name refuses the file. Tensors are returned as `LazyTensor`: the numbers are mapped from disk on demand.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import BadInput
from .lazy import LazyTensor, map_bytes
from .pickles import check_opcodes
from .regular import open_regular

ALIGNMENT = 64  # bytes; as torch aligns, so that tensors can be mapped
PADDING = b"FB"  # torch's id for the extra field that does the aligning
INERT_PACKAGES = ("omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "nemo")
INERT_NAMES = frozenset(
    {
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "_codecs.encode",  # how numpy scalars and bytes are spelt in old pickle protocols
        "typing.Any",  # OmegaConf's metadata names types; none is ever called
        "argparse.Namespace",
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in
          ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
        *(f"collections.{name}" for name in ("defaultdict", "Counter", "deque")),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
          "numpy._core.numeric") for name in ("_reconstruct", "_frombuffer")),
        "numpy.ndarray",
        "torch.device",
        "uuid.UUID",
        "_io.BytesIO",  # scales that Transformer Engine keeps as _extra_state
        "io.BytesIO",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in
          ("dict", "list", "tuple", "set", "frozenset", "str", "int", "long", "float", "bool", "bytes", "complex")),
    }
)  # fmt: skip
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Inert:
    """Stands for an object of a listed class that weights do not need. Keeps its pickled state, does nothing."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state = {**(self.state or {}), key: value} if isinstance(key, str) else self.state

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append


class _Builder:
    """Stands for a listed torch function: calls ours, and refuses the state that a pickle's BUILD would set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a function")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


def read_torch_zip(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return the object that torch.save wrote, with every tensor a `LazyTensor`.

    start, length: byte range of the zip inside `path` (a member of an uncompressed tar); the whole file by default.
    Raises BadInput for a damaged file, compressed members (torch never writes any; a bomb might) and unlisted globals.
    """
    with open_regular(path) as file:
        window: Any = _Window(file, start, length) if length is not None else file
        try:
            return _unpickle(path, window, start)
        except BadInput:
            raise
        except (zipfile.BadZipFile, EOFError, struct.error, OSError) as error:
            raise BadInput(
                f"{path}: truncated or damaged torch file ({_one_line(error)}); fetch or copy it again"
            ) from None
        except Exception as error:
            # A pickle can fail in any way its author likes; all of them mean the same to the reader.
            raise BadInput(f"{path}: its pickle is damaged or not torch's ({_one_line(error)})") from None


def _unpickle(path: Path, window: Any, start: int) -> Any:
    with zipfile.ZipFile(window) as archive:
        pickles = [
            info for info in archive.infolist() if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")
        ]
        if len(pickles) != 1:
            raise BadInput(f"{path}: a zip, but not one written by torch.save (no data.pkl inside)")
        members = {info.filename: info for info in archive.infolist()}
        if packed := [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]:
            raise BadInput(f'{path}: "{packed[0]}" is compressed, which torch.save never does; refused')
        root = pickles[0].filename.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise BadInput(f"{path}: written on a big-endian machine; save it again on a little-endian one")
        data = archive.read(pickles[0])
        check_opcodes(path, data)
        return _TensorUnpickler(path, data, members, root, start, window).load()


class _TensorUnpickler(pickle.Unpickler):
    def __init__(
        self, path: Path, data: bytes, members: dict[str, zipfile.ZipInfo], root: str, start: int, window: IO[bytes]
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path, self._members, self._root, self._start, self._window = path, members, root, start, window
        self._inert: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in _BUILDERS:
            return _Builder(getattr(self, _BUILDERS[full]))
        if full in INERT_NAMES or module.split(".")[0] in INERT_PACKAGES:
            return self._inert.setdefault(full, type(name, (Inert,), {}))  # fresh per file: state cannot leak
        raise BadInput(f"{self._path}: refused, its pickle names {full}, which is no tensor and could run code")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, dtype, key, _location, numel = pid
        if tag != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int):
            raise pickle.UnpicklingError("unknown persistent id")
        info = self._members.get(f"{self._root}data/{key}")
        if info is None or numel < 0 or numel * dtype.itemsize > info.file_size:
            raise BadInput(f'{self._path}: tensor data "{key}" is missing or too short; fetch or copy it again')
        return _Storage(str(key), dtype, numel)

    def rebuild_tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any
    ) -> LazyTensor:
        return self._tensor(storage, storage.dtype, offset, shape, stride)

    def rebuild_tensor_v3(self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int],
                          _grad: Any, _hooks: Any, dtype: torch.dtype, *_: Any) -> LazyTensor:  # fmt: skip
        return self._tensor(storage, dtype, offset, shape, stride)

    def rebuild_parameter(self, data: LazyTensor, *_: Any) -> LazyTensor:
        return data

    def rebuild_from_type(self, function: _Builder, _type: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
        return function(*arguments)

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def _tensor(
        self, storage: _Storage, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
    ) -> LazyTensor:
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("bad tensor geometry")
        held = storage.numel * storage.dtype.itemsize // dtype.itemsize
        count = math.prod(shape)
        last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) if count else -1
        if last >= held or count > held:
            raise BadInput(
                f'{self._path}: a tensor of shape {tuple(shape)} claims more than its data "{storage.key}" holds'
            )
        at = self._start + self._data_offset(storage.key)
        size = storage.numel * storage.dtype.itemsize

        def read() -> Tensor:
            flat = map_bytes(self._path, at, size, dtype)
            return flat.as_strided(shape, stride, flat.storage_offset() + offset)

        return LazyTensor(dtype, tuple(shape), read)

    def _data_offset(self, key: str) -> int:
        """Return where a stored member's bytes begin: after its header, whose extra field torch uses for alignment."""
        header = self._members[f"{self._root}data/{key}"].header_offset
        self._window.seek(header + 26)
        name_length, extra_length = struct.unpack("<HH", self._window.read(4))
        return int(header + 30 + name_length + extra_length)


_BUILDERS = {
    "torch._utils._rebuild_tensor": "rebuild_tensor",
    "torch._utils._rebuild_tensor_v2": "rebuild_tensor",
    "torch._utils._rebuild_tensor_v3": "rebuild_tensor_v3",
    "torch._utils._rebuild_parameter": "rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state": "rebuild_parameter",
    "torch._tensor._rebuild_from_type_v2": "rebuild_from_type",
    "torch.Size": "size",
}


class _Window(io.RawIOBase):
    """A byte range of an open file, seen as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


class _NewStorage:
    """A storage that the pickle names by its key; its numbers follow as a zip member."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.id = ("storage", getattr(torch, STORAGE_NAMES[dtype]), key, "cpu", numel)


class _Stub:
    """Pickles as a contiguous tensor over a `_NewStorage`."""

    def __init__(self, storage: _NewStorage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        stride = tuple(torch.empty(self.shape, device="meta").stride())
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments  # the name every torch reads


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _NewStorage) else None


def write_torch_zip(
    file: IO[bytes], tensors: Mapping[str, LazyTensor], written: Callable[[str], None] | None = None
) -> None:
    """Write what torch.save(dict(tensors)) would, at the file's present position, which must be 0 or aligned to 64.

    torch's own writer would do, but it aborts the process when it is not finished, as after Ctrl-C.
    One tensor at a time is in memory. written: called with each name once its tensor is in the file.
    """
    stubs = {
        name: _Stub(_NewStorage(str(i), tensor.dtype, tensor.numel), tensor.shape)
        for i, (name, tensor) in enumerate(tensors.items())
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(stubs)
    with zipfile.ZipFile(_FromHere(file), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        _member(archive, "archive/data.pkl", buffer.getvalue())
        _member(archive, "archive/byteorder", b"little")
        for i, (name, tensor) in enumerate(tensors.items()):
            _member(archive, f"archive/data/{i}", tensor.to_bytes())
            if written:
                written(name)
        _member(archive, "archive/version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980: the same tensors give the same bytes
    info.file_size = memoryview(data).nbytes
    assert archive.fp is not None
    bare = archive.fp.tell() + 30 + len(name) + 4
    gap = -bare % ALIGNMENT
    info.extra = PADDING + gap.to_bytes(2, "little") + b"Z" * gap
    with archive.open(info, "w") as member:
        member.write(data)


class _FromHere:
    """A file whose position 0 is another file's present position: a zip inside that file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        return self._file.seek(self._start + offset) - self._start
