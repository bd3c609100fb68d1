"""Writing torch's zip format one tensor at a time, so that a model never has to be in memory as a whole."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from .pickles import STORAGES, LazyTensor

ALIGNMENT = 64  # bytes; as torch aligns, so that tensors can be mapped
PADDING = b"FB"  # torch's id for the extra field that does the aligning
NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


class _Storage:
    """What the pickle refers to by number; its numbers follow as a zip member."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.id = ("storage", getattr(torch, NAMES[dtype]), key, "cpu", numel)


class _Stub:
    """Pickles as a contiguous tensor over a `_Storage`."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Callable, tuple]:
        stride = tuple(torch.empty(self.shape, device="meta").stride())
        arguments: tuple = (self.storage, 0, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments  # the name every torch reads


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _Storage) else None


def write_torch_zip(
    file: IO[bytes],
    tensors: Mapping[str, Tensor | LazyTensor],
    to_bytes: Callable[[Tensor | LazyTensor], Any],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write what torch.save(dict(tensors)) would, at the file's present position, which must be 0 or aligned to 64.

    to_bytes: a tensor's numbers, row-major. written: told each name once its tensor is in the file.
    """
    stubs = {
        name: _Stub(_Storage(str(i), tensor.dtype, torch.Size(tensor.shape).numel()), tuple(tensor.shape))
        for i, (name, tensor) in enumerate(tensors.items())
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(stubs)
    with zipfile.ZipFile(_FromHere(file), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        _member(archive, "archive/data.pkl", buffer.getvalue())
        _member(archive, "archive/byteorder", b"little")
        for i, (name, tensor) in enumerate(tensors.items()):
            _member(archive, f"archive/data/{i}", to_bytes(tensor))
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
    """A file whose position 0 is where the given one stands now: a zip inside another file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        return self._file.seek(self._start + offset) - self._start
