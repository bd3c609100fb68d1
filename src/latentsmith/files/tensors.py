"""Files of named tensors, whatever their container: open by content, read lazily, write safetensors.

`open_tensors` reads headers only; a tensor's numbers come from disk when it is asked for. `save_safetensors` streams,
one tensor at a time, so a 3.4 GB file needs little more memory than its largest tensor.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import atomic_open
from .errors import BadInput
from .pickles import LazyTensor, map_bytes, read_torch_zip
from .regular import JSON, open_regular, read_regular

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorFile(Mapping[str, Tensor]):
    """Names to tensors, read when asked for.

    entries: shape and dtype of each, from the header. metadata: the safetensors string header.
    extras: what a pickle held beside tensors (`global_step`, `hyper_parameters`, ...).
    files: those that were opened, where it is not `path` alone.
    """

    path: Path
    entries: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_tensors(path: str | Path) -> TensorFile:
    """Open .safetensors, torch .ckpt / .bin / .pt (zip format) or a sharded `*.index.json`, a variant's too, told
    apart by content.

    Raises BadInput, one line, for anything missing, empty, truncated, of another type or unsafe.
    """
    path = Path(path)
    start = _first_bytes(path)
    if start[:4] == b"PK\x03\x04":
        return tensors_of(path, read_torch_zip(path))
    if ".index." in path.name and path.suffix == ".json":  # a variant's name stands between the two
        return _open_sharded(path)
    if len(start) >= 9 and start[8:9] == b"{":
        return _open_safetensors(path)
    raise BadInput(f"{path}: {_what_it_looks_like(start)}")


def save_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[str], None] | None = None,
) -> None:
    """Write `tensors` atomically, contiguous, one at a time; byte for byte what the safetensors library writes.

    written: told each name once its tensor is in the file.
    """
    # Wider types first, then names: every tensor starts aligned without padding, as the library does it.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, _dtype_rank(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        size = _numel(tensor) * tensor.dtype.itemsize
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise BadInput(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_open(Path(path)) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            file.write(tensor_bytes(tensors[name]))
            if written:
                written(name)


def tensor_bytes(tensor: Tensor | LazyTensor) -> memoryview:
    """The tensor's numbers in row-major order, little-endian."""
    value = tensor.read() if isinstance(tensor, LazyTensor) else tensor.detach()
    flat = value.to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def tensors_of(path: Path, loaded: Any) -> TensorFile:
    """A flat state dict from an unpickled object: its `state_dict` if it has one, else itself."""
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    inner = loaded.get("state_dict", loaded)
    if not isinstance(inner, dict):
        raise BadInput(f"{path}: its state_dict is a {type(inner).__name__}, not a dictionary of tensors")
    entries = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, LazyTensor)}
    if not entries:
        raise BadInput(f"{path}: holds no tensors")
    extras = {str(name): value for name, value in loaded.items() if name != "state_dict" and str(name) not in entries}
    return TensorFile(path, entries, extras=extras)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, a file was expected")
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise BadInput(f"{path}: is empty (0 bytes); fetch or copy it again")
    return start


def _what_it_looks_like(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights; run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not weights; the download needs a login or another address"
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        return "is an archive (.nemo or tar), not a tensor file"
    if start[:1] == b"\x80":
        return "is a torch file from before version 1.6; save it again with torch.save"
    return "is neither safetensors nor a torch file (or is truncated)"


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER or 8 + length > size:
            raise BadInput(
                f"{path}: truncated: header of {length:,} bytes in a file of {size:,}; fetch or copy it again"
            )
        header = file.read(length)
    try:
        table = json.loads(header)
        metadata = {str(key): str(value) for key, value in table.pop("__metadata__", {}).items()}
        rows = {
            name: (SAFETENSORS_DTYPES[row["dtype"]], tuple(row["shape"]), *row["data_offsets"])
            for name, row in table.items()
        }
        _check_layout(path, rows, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path}: its safetensors header is damaged ({type(error).__name__}: {str(error)[:80]})"
        ) from None
    return TensorFile(path, {name: _mapped_entry(path, 8 + length, *row) for name, row in rows.items()}, metadata)


def _check_layout(path: Path, rows: Mapping[str, tuple], held: int) -> None:
    """Tensors lie back to back, without holes or overlaps, to the end of the file."""
    at = 0
    for name, (dtype, shape, begin, end) in sorted(rows.items(), key=lambda row: row[1][2:]):
        expected = dtype.itemsize
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise ValueError(f"shape {shape} of {name}")
            expected *= extent
        if begin != at or end != begin + expected:
            raise ValueError(f"data offsets of {name}")
        at = end
    if at != held:
        raise BadInput(
            f"{path}: truncated or padded: {held:,} bytes of tensors, {at:,} expected; fetch or copy it again"
        )


def _mapped_entry(
    path: Path, data: int, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int
) -> LazyTensor:
    return LazyTensor(dtype, shape, lambda: map_bytes(path, data + begin, end - begin, dtype).reshape(shape))


def _open_sharded(path: Path) -> TensorFile:
    try:
        table = json.loads(read_regular(path, JSON))["weight_map"]
        shards = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f'{path}: is no shard index (no "weight_map" of tensor names to files)') from None
    if bad := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
        raise BadInput(f"{path}: shard {bad[0]!r} must be a plain file name beside the index")
    opened = {shard: open_tensors(path.parent / shard) for shard in shards}
    if lost := [name for name, shard in table.items() if name not in opened[shard]]:
        raise BadInput(f"{path}: {lost[0]} is not in its shard {table[lost[0]]}")
    entries = {name: opened[shard].entries[name] for name, shard in table.items()}
    files = (path, *(path.parent / shard for shard in shards))
    return TensorFile(path, entries, opened[shards[0]].metadata if shards else {}, files=files)


def _numel(tensor: Tensor | LazyTensor) -> int:
    return tensor.numel if isinstance(tensor, LazyTensor) else tensor.numel()


def _dtype_rank(dtype: torch.dtype) -> int:
    return -_RANKED.index(dtype) if dtype in _RANKED else 0


# The library's order among dtypes (ascending), which it walks downwards.
_RANKED = [torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.float16,
           torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64]  # fmt: skip
