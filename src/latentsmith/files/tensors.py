"""Open files of named tensors, whatever their container, read them lazily, write safetensors.

`open_tensors` reads headers only; a tensor's numbers come from disk when it is asked for. `save_safetensors` streams,
one tensor at a time, so a 3.4 GB file needs little more memory than its largest tensor.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import atomic_open
from .errors import BadInput
from .json import parse_json, read_json
from .lazy import LazyTensor
from .regular import check_regular, open_regular
from .torch_zip import read_torch_zip

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
MOST_DIMENSIONS = 16
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # keys under which programs put a state dict
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorFile(Mapping[str, Tensor]):
    """A mapping from names to tensors, each read from disk when it is looked up.

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
    """Open .safetensors, torch .ckpt / .bin / .pt (zip format) or a sharded `*.index.json`, recognised by content.

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
    """Write `tensors` atomically, contiguous, one at a time, which the safetensors library cannot.

    written: called with each name once its tensor is in the file. Raises BadInput for a dtype of no safetensors name.
    """
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    for name, tensor in lazy.items():
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise BadInput(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
    with atomic_open(Path(path)) as file:
        file.write(safetensors_header(lazy, metadata))
        for name in stored_order(lazy):
            file.write(lazy[name].to_bytes())
            if written:
                written(name)


def stored_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return the names in the order in which safetensors stores tensors.

    Wider types first, then by name: every tensor starts aligned without padding.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def safetensors_header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return all bytes of a safetensors file before its tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in stored_order(tensors):
        tensor = tensors[name]
        end = at + tensor.numel * tensor.dtype.itemsize
        dtype, shape = SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def tensors_of(path: Path, loaded: Any) -> TensorFile:
    """Return the flat state dict of an unpickled object: its `state_dict` if it has one, else itself."""
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    inner = loaded.get("state_dict", loaded)
    while isinstance(inner, dict) and not any(isinstance(value, LazyTensor) for value in inner.values()):
        wrapper = next((key for key in WRAPPERS if isinstance(inner.get(key), dict)), None)
        if wrapper is None:
            break
        inner = inner[wrapper]
    if not isinstance(inner, dict):
        raise BadInput(f"{path}: its state_dict is a {type(inner).__name__}, not a dictionary of tensors")
    entries = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, LazyTensor)}
    if not entries:
        raise BadInput(f"{path}: holds no tensors")
    extras = {str(name): value for name, value in loaded.items() if name not in WRAPPERS and str(name) not in entries}
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
    check_header(path)
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        entries = {
            name: LazyTensor(SAFETENSORS_DTYPES[row.get_dtype()], tuple(row.get_shape()), partial(_read, file, name))
            for name, row in slices.items()
        }
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")[:80]
        raise _damaged(path, path.stat().st_size, reason) from None
    return TensorFile(path, entries, file.metadata() or {})


def check_header(path: Path) -> None:
    """Raise BadInput unless the header of a safetensors file describes the bytes after it, tensor after tensor."""
    size = check_regular(path).st_size
    with open_regular(path) as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(LONGEST_HEADER, size - 8):
            raise _damaged(path, size, f"a header of {length:,} bytes")
        text = file.read(length)
    try:
        header = parse_json(text, "its header", "a JSON object")
    except BadInput as error:
        raise _damaged(path, size, str(error)) from None
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict | None) or not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise _damaged(path, size, "its __metadata__ is no table of texts")
    at = 0
    for start, end, name in sorted((*_offsets(path, size, name, row), name) for name, row in header.items()):
        if start != at:
            raise _damaged(path, size, f"{name[:60]!r} starts at byte {start}, not at {at}")
        at = end
    if 8 + length + at != size:
        raise _damaged(path, size, f"its header describes {8 + length + at:,}")


def _offsets(path: Path, size: int, name: str, row: Any) -> tuple[int, int]:
    """Return where a tensor of a header starts and ends. Raises BadInput for a row that describes none."""
    row = row if isinstance(row, dict) else {}
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    known = SAFETENSORS_DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None or not (_are_counts(shape) and _are_counts(offsets)) or len(offsets) != 2:
        raise _damaged(path, size, f"{name[:60]!r} has no known dtype, shape and data_offsets")
    if len(shape) > MOST_DIMENSIONS or math.prod(shape) * known.itemsize != offsets[1] - offsets[0]:
        raise _damaged(path, size, f"{name[:60]!r} does not fill its data_offsets")
    return offsets[0], offsets[1]


def _damaged(path: Path, size: int, reason: str) -> BadInput:
    return BadInput(
        f"{path}: damaged or truncated safetensors file of {size:,} bytes ({reason}); fetch or copy it again"
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _read(file: Any, name: str) -> Tensor:
    """Map one tensor of an open safetensors file; a header of odd length leaves it misaligned, and it is copied."""
    tensor: Tensor = file.get_tensor(name)
    return tensor if tensor.data_ptr() % tensor.dtype.itemsize == 0 else tensor.clone()


def _open_sharded(path: Path) -> TensorFile:
    table = read_json(path, "an index of tensor shards").get("weight_map")
    if not isinstance(table, dict):
        raise BadInput(f'{path}: is no shard index (no "weight_map" of tensor names to files)')
    if bad := [shard for shard in table.values() if not isinstance(shard, str) or Path(shard).name != shard]:
        raise BadInput(f"{path}: shard {bad[0]!r} must be a plain file name beside the index")
    opened = {shard: open_tensors(path.parent / shard) for shard in sorted(set(table.values()))}
    if lost := [name for name, shard in table.items() if name not in opened[shard]]:
        raise BadInput(f"{path}: {lost[0]} is not in its shard {table[lost[0]]}")
    entries = {name: opened[shard].entries[name] for name, shard in table.items()}
    first = next(iter(opened.values()), None)
    return TensorFile(path, entries, first.metadata if first else {}, files=(path, *(f.path for f in opened.values())))
