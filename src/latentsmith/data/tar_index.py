"""The index of a tar: one row per sample, with the offset and size of each of its members.

A structured array: the field `key`, and for each extension in the tar the field `.EXTENSION` with `(offset, size)` in
bytes, offset 0 where a sample has no such member. It lies beside the tar as `.index.npy` and is read as a memory map.
"""

import os
import re
import tarfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput

Row = tuple[str, dict[str, tuple[int, int]]]  # key, then (offset, size) of each member by extension

MAX_EXTENSIONS = 64
BLOCK = tarfile.BLOCKSIZE
# WebDataset's rule: the extension starts at the first dot of the file's name.
SAMPLE_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


def index_path(tar: Path) -> Path:
    """Return where the index of `shard-000000.tar` lies: `shard-000000.index.npy`."""
    return tar.with_suffix(".index.npy")


def build_index(path: Path, opened: AbstractContextManager[IO[bytes]] | None = None) -> np.ndarray:
    """Return the index of a tar: a row for each run of members with one key. opened: its bytes, if not at `path`.

    Raises BadInput, naming the byte, if the tar is damaged.
    """
    rows: list[Row] = []
    for name, offset, size in _members(path, opened):
        match = SAMPLE_NAME.fullmatch(name)
        if not match:
            continue  # WebDataset passes over names without an extension as well
        key, extension = match[1], match[2].lower()
        if not rows or rows[-1][0] != key:
            rows.append((key, {}))
        if extension in rows[-1][1]:
            raise BadInput(f"{path}: two members named {name!r}, the second at byte {offset:,}; rebuild the tar")
        rows[-1][1][extension] = (offset, size)
    return index_array(path, rows)


def index_array(path: Path, rows: Sequence[Row]) -> np.ndarray:
    """Rows as the structured array; `path` is for the message of BadInput, when members have too many extensions."""
    extensions = sorted({extension for _, spans in rows for extension in spans})
    if len(extensions) > MAX_EXTENSIONS:
        raise BadInput(f"{path}: {len(extensions)} extensions of members; a tar of samples has a few (jpg, txt, json)")
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in rows]
    width = max(map(len, keys), default=1)
    index = np.zeros(len(rows), dtype=[("key", f"S{width}")] + [(f".{name}", "<u8", (2,)) for name in extensions])
    index["key"] = keys
    for name in extensions:
        index[f".{name}"] = [spans.get(name, (0, 0)) for _, spans in rows]
    return index


def load_index(tar: Path, data: Any) -> np.ndarray | None:
    """Return the index beside a tar, memory-mapped; None if there is none, or it is not of the tar's `data`."""
    index = load_beside(index_path(tar), is_index)
    return index if index is not None and _fits(index, data) else None


def write_index(tar: Path, index: np.ndarray) -> None:
    """Write the index beside a tar, unless a file of that name is no index."""
    write_beside(index_path(tar), index, is_index)


def is_index(array: np.ndarray) -> bool:
    """Return whether an array is an index by its fields."""
    names = array.dtype.names or ()
    return names[:1] == ("key",) and all(n.startswith(".") and array.dtype[n].shape == (2,) for n in names[1:])


def load_beside(path: Path, is_ours: Callable[[np.ndarray], bool]) -> np.ndarray | None:
    """Return the array that we wrote beside a tar, memory-mapped; None if there is none."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (ValueError, OSError, EOFError):
        return None
    return array if is_ours(array) else None


def write_beside(path: Path, array: np.ndarray, is_ours: Callable[[np.ndarray], bool]) -> None:
    """Write an array beside a tar. A file of that name that we did not write stays, and nothing is written."""
    if not path.exists() or load_beside(path, is_ours) is not None:
        with atomic_open(path) as file:
            np.save(file, array, allow_pickle=False)


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes fills in a tar."""
    return -(-size // BLOCK) * BLOCK


def _members(path: Path, opened: AbstractContextManager[IO[bytes]] | None) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each regular file in a tar, which must be whole to its end-of-archive mark."""
    with opened or open(path, "rb") as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.TarFile(fileobj=file) as tar:
                members = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
                stopped = tar.offset  # past an unreadable header tarfile ends as if the archive did
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            where = f"near byte {file.tell():,} of {total:,}"
            raise BadInput(f"{path}: truncated or garbage, no plain tar {where} ({error}); make it again") from None
        file.seek(stopped)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadInput(f"{path}: the tar is truncated: it ends at byte {total:,} without its end mark; make it again")
    if any(block):
        raise BadInput(f"{path}: garbage instead of a tar header at byte {stopped:,} of {total:,}; make the tar again")
    return members


def _fits(index: np.ndarray, data: Any) -> bool:
    """Return whether an index ends exactly where the tar does: at the zero block after the last member."""
    if not len(index):
        return False
    last = max((index[name][-1].tolist() for name in (index.dtype.names or ())[1:]), default=[0, 0])
    end = last[0] + padded(last[1])
    return data[end : end + BLOCK] == bytes(BLOCK)
