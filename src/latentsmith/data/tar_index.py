"""The index of a tar: one row per sample, with the offset and size of each of its members.

A structured array: the field `key`, and for each extension in the tar the field `.EXTENSION` with `(offset, size)` in
bytes, offset 0 where a sample has no such member. It lies beside the tar as `.index.npy` and is read as a memory map.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.text import LFS_ADVICE, LFS_POINTER

Row = tuple[str, dict[str, tuple[int, int]]]  # key, then (offset, size) of each member by extension

MAX_EXTENSIONS = 64
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
PACKED_NAME = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst|zip|7z|rar)", re.IGNORECASE)
JUNK = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
                  "Thumbs.db", "desktop.ini"})  # what systems leave beside files  # fmt: skip
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
        if not match or JUNK.intersection(name.split("/")):
            continue  # WebDataset passes over names without an extension as well
        key, extension = match[1], match[2].lower()
        if not rows or rows[-1][0] != key:
            rows.append((key, {}))
        if extension in rows[-1][1]:
            raise BadInput(f"{path}: two members named {name!r}, the second at byte {offset:,}; rebuild the tar")
        rows[-1][1][extension] = (offset, size)
    return index_array(path, rows)


def index_array(path: Path, rows: Sequence[Row]) -> np.ndarray:
    """Return rows as the structured array. Raises BadInput, naming `path`, for too many extensions of members."""
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


def load_index(tar: Path, data: Any, rows_checked: int | None = None) -> np.ndarray | None:
    """Return the index beside a tar, memory-mapped; None if there is none, or it is not of the tar's `data`.

    rows_checked: compare only so many samples, evenly spread, with the tar's headers; all by default.
    """
    index = load_beside(index_path(tar), is_index)
    return index if index is not None and _fits(index, data, rows_checked) else None


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
    """Return the bytes that a member of `size` bytes fills in a tar."""
    return -(-size // BLOCK) * BLOCK


def _members(path: Path, opened: AbstractContextManager[IO[bytes]] | None) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of each regular file in a tar, which must be whole to its end-of-archive mark.

    A link to a member has the span of that member. Tars put together by `cat` are read one after the other.
    """
    members: list[tuple[str, int, int]] = []
    links: list[tuple[int, str, str]] = []  # index in `members`, name, name of the target
    start: int | None = 0
    with opened or open(path, "rb") as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(BLOCK)
        if head.startswith(LFS_POINTER):
            raise BadInput(f"{path}: {LFS_ADVICE}")
        if compression := compression_of(head):
            raise BadInput(f"{path}: a tar compressed with {compression}, of which no sample can be read; unpack it")
        while start is not None:
            file.seek(start)
            try:
                with tarfile.TarFile(fileobj=file) as tar:
                    for member in tar:
                        if member.issparse():
                            where = f"member {member.name!r} at byte {member.offset:,} is stored sparse"
                            raise BadInput(f"{path}: {where}; make the tar again without --sparse")
                        if member.isreg():
                            members.append((member.name, member.offset_data, member.size))
                        elif (member.islnk() or member.issym()) and SAMPLE_NAME.fullmatch(member.name):
                            below = os.path.dirname(member.name) if member.issym() else ""
                            target = posixpath.normpath(posixpath.join(below, member.linkname))
                            links.append((len(members), member.name, target))
                            members.append((member.name, 0, 0))
                    stopped = tar.offset  # past an unreadable header tarfile ends as if the archive did
            except BadInput:
                raise
            except (tarfile.TarError, ValueError, EOFError, OSError) as error:
                where = f"near byte {file.tell():,} of {total:,}"
                raise BadInput(f"{path}: truncated or garbage, no plain tar {where} ({error}); make it again") from None
            file.seek(stopped)
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                ends = f"it ends at byte {total:,} without its end mark"
                raise BadInput(f"{path}: the tar is truncated: {ends}; make it again")
            if any(block):
                garbage = f"garbage instead of a tar header at byte {stopped:,} of {total:,}"
                raise BadInput(f"{path}: {garbage}; make the tar again")
            start = _next_tar(file, stopped)
    spans = {posixpath.normpath(name): (offset, size) for name, offset, size in members if offset}
    for number, name, target in links:
        if target not in spans:
            raise BadInput(f"{path}: member {name!r} is a link to {target!r}, which is not in the tar; store the file")
        spans[posixpath.normpath(name)] = spans[target]
        members[number] = (name, *spans[target])
    return members


def refuse_packed(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise BadInput if one of a folder's files is a compressed tar or another archive, by its name."""
    if packed := sorted(name for name in names if PACKED_NAME.fullmatch(name)):
        where = f"{packed[0]} is compressed, and no sample of it can be read"
        raise BadInput(f"{folder}: {where}; unpack it (a .tar may stay a tar)")


def compression_of(head: bytes) -> str | None:
    """Return what compressed a file, from its first bytes; None if nothing known did."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def _next_tar(file: IO[bytes], end_mark: int) -> int | None:
    """Return the byte at which another tar begins after an end mark; None if only zeros follow it."""
    file.seek(end_mark)
    at = end_mark
    while piece := file.read(2**20):
        if rest := piece.lstrip(b"\0"):
            return (at + len(piece) - len(rest)) // BLOCK * BLOCK
        at += len(piece)
    return None


def _fits(index: np.ndarray, data: Any, rows_checked: int | None) -> bool:
    """Return whether an index ends where the tar does, and its members' names and sizes are in the tar's headers."""
    if not len(index):
        return False
    extensions = (index.dtype.names or ())[1:]
    spans = np.stack([index[name] for name in extensions], axis=1).reshape(-1, 2)  # sample by sample
    offsets, first = np.unique(spans[:, 0], return_index=True)  # later samples share the member or link to it
    first = first[offsets > 0]
    last = spans[spans[:, 0].argmax()].tolist()
    if last[0] + padded(last[1]) + BLOCK > len(data) or any(data[last[0] + padded(last[1]) :].lstrip(b"\0")[:1]):
        return False
    rows = first // len(extensions)
    if rows_checked is not None and rows_checked < len(index):
        chosen = np.linspace(0, len(index) - 1, rows_checked).astype(int)
        first = first[np.isin(rows, chosen)]
    for at in first.tolist():
        row, column = divmod(at, len(extensions))
        offset, size = spans[at].tolist()
        if not _is_header(data[offset - BLOCK : offset], index["key"][row] + extensions[column].encode(), size):
            return False
    return True


def _is_header(header: bytes, name: bytes, size: int) -> bool:
    """Return whether a block is the header of a file of this name, its extension in lower case, and of this size."""
    if len(header) < BLOCK or header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return False
    held = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].rstrip(b"\0")):
        held = prefix + b"/" + held
    stem = SAMPLE_NAME.fullmatch(held.decode("utf-8", "surrogateescape"))
    if stem is None or f"{stem[1]}.{stem[2].lower()}".encode("utf-8", "surrogateescape") != name:
        return False  # also a name that is in an extra header, being long or not ASCII: such a tar is indexed each time
    try:
        return int(header[124:136].rstrip(b" \0") or b"0", 8) == size
    except ValueError:
        return False
