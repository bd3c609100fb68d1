"""Indexed shards: plain WebDataset tars in which any sample is one slice of a memory map away.

Beside `shard-000000.tar` lies `shard-000000.index.npy`, one row per sample: its key, and for each extension in the
shard the offset and size of that member (offset 0: the sample has none). A finished folder has `set.json`, which names the
shards and counts their samples, so that opening a set reads one small file and maps a shard only when it is touched.
A folder still being filled has `unfinished.json` and is refused.
"""

import bisect
import json
import mmap
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import numpy as np

from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.files.errors import BadInput

SET_FILE = "set.json"
UNFINISHED_FILE = "unfinished.json"
OPEN_SHARDS = 256  # each holds two file descriptors, and 1,024 is the usual limit of a process
MAX_EXTENSIONS = 64
BLOCK = tarfile.BLOCKSIZE
SAMPLE_NAME = re.compile(
    r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL
)  # WebDataset's rule: the extension starts at the first dot


@dataclass(frozen=True)
class Sample:
    """One sample: its key, and its members by extension (`jpg`, `image_encoded.npy`), viewing the mapped file."""

    key: str
    members: Mapping[str, memoryview]

    def text(self, extension: str) -> str:
        return bytes(self.members[extension]).decode("utf-8")


class Shard:
    """One tar, memory-mapped, with its index; builds the index if there is none or it is of another tar."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.bytes = _map_file(self.path)
        self.index = self._open_index()
        self.extensions: tuple[str, ...] = (self.index.dtype.names or ())[1:]

    def _open_index(self) -> np.ndarray:
        index_path = index_path_of(self.path)
        if index_path.exists():
            try:
                index = np.load(index_path, mmap_mode="r", allow_pickle=False)
                if _fits(index, self.bytes):
                    return index
            except (ValueError, OSError, EOFError):
                pass  # an unreadable index is rebuilt as a missing one is
        index = build_index(self.path)
        with suppress(OSError):  # in a read-only folder the index lives in memory, and is built again next time
            _save_index(index_path, index)
        return index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        row = self.index[number].item()
        spans = zip(self.extensions, row[1:], strict=True)
        view = memoryview(self.bytes)
        members = {name: view[offset : offset + size] for name, (offset, size) in spans if offset}
        return Sample(row[0].decode("utf-8", "surrogateescape"), members)

    def member(self, number: int, extension: str) -> memoryview:
        """The bytes of one member; BadInput, naming shard and key, if the sample has none of that extension."""
        offset, size = self.index[extension][number].tolist() if extension in self.extensions else (0, 0)
        if not offset:
            raise BadInput(f"{self.path}: sample {self.key(number)!r} has no .{extension} member")
        return memoryview(self.bytes)[offset : offset + size]

    def key(self, number: int) -> str:
        return self.index["key"][number].decode("utf-8", "surrogateescape")


class ShardSet(Sequence):
    """A random-access sequence of samples over tar shards.

    source: a finished folder, a folder of WebDataset tars, one tar, a pattern such as `shard-{000..010}.tar` or
    `shard-*.tar`, or a list of these. BadInput if there is none, the folder is unfinished, or a tar is damaged.
    Nothing per sample is held in memory; at most OPEN_SHARDS shards are mapped at once. Can be pickled to workers.
    """

    def __init__(self, source: str | os.PathLike | Sequence[str | os.PathLike]):
        shards = _find_shards(source)
        if not shards:
            raise BadInput(
                f"{source}: no .tar shards here; `latentsmith data import` makes them from images and captions"
            )
        self.paths = [path for path, _ in shards]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self.counts = [len(self.shard(i)) if count is None else count for i, (_, count) in enumerate(shards)]
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        shard, number = self.locate(index)
        return self.shard(shard)[number]

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds sample `index`, and the sample's number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a set of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.counts[shard])

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped; BadInput if it has vanished or no longer has the samples that set.json counts."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.paths[number])
            if hasattr(self, "counts") and len(shard) != self.counts[number]:
                raise BadInput(
                    f"{shard.path}: {len(shard)} samples where {self.counts[number]} were counted; import again"
                )
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # maps do not travel; a worker opens its own


class ShardWriter:
    """Writes samples into `folder/shard-000000.tar`, ..., each renamed into place, with its index, once it is full.

    start: number of the first shard. Use as a context manager: an error discards the shard in hand, a clean end
    finishes it. `finished` lists (file name, samples, bytes) of the shards this writer has completed.
    """

    def __init__(self, folder: str | os.PathLike, samples_per_shard: int = 1000, start: int = 0):
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.number = start
        self.finished: list[tuple[str, int, int]] = []
        self._tar: _OpenTar | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample. Keys hold no dot, at most their extensions do (ours: decided where keys are made)."""
        assert members and SAMPLE_NAME.fullmatch(f"{key}.x") and "." not in key, key
        if self._tar is None:
            self._tar = _OpenTar(self.folder / shard_name(self.number))
        self._tar.add(key, members)
        if len(self._tar.rows) >= self.samples_per_shard:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Complete the shard in hand, if there is one."""
        if self._tar is not None:
            size = self._tar.finish()
            self.finished.append((self._tar.path.name, len(self._tar.rows), size))
            self._tar = None
            self.number += 1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.finish_shard()
        elif self._tar is not None:
            self._tar.discard(error)


class _OpenTar:
    """A tar being written aside, and the rows of its index."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self._context = atomic_open(path)
        self._file = self._context.__enter__()
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w")

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        spans = {}
        for extension, data in members.items():
            header = tarfile.TarInfo(
                f"{key}.{extension}"
            )  # time, owner and mode stay fixed: equal samples, equal shards
            header.size = len(data)
            self._tar.addfile(header, BytesIO(data))
            spans[extension] = (self._tar.offset - _padded(len(data)), len(data))
        self.rows.append((key, spans))

    def finish(self) -> int:
        self._tar.close()
        size = self._file.tell()
        self._context.__exit__(None, None, None)
        _save_index(index_path_of(self.path), _index_array(self.path, self.rows))
        return size

    def discard(self, error: BaseException) -> None:
        try:
            self._context.__exit__(type(error), error, None)
        except type(error):
            pass  # atomic_open has removed the file and passes the caller's own error on


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def index_path_of(tar: Path) -> Path:
    return tar.with_suffix(".index.npy")


def write_set_file(folder: Path, shards: Sequence[tuple[str, int, int]]) -> None:
    """Mark a folder as finished: its shards as (file name, samples, bytes), in order."""
    listing = [{"file": name, "samples": samples, "bytes": size} for name, samples, size in shards]
    whole = {"format": "latentsmith-shards-1", "samples": sum(samples for _, samples, _ in shards), "shards": listing}
    write_text(folder / SET_FILE, json.dumps(whole, indent=1) + "\n")


def read_set_file(folder: Path) -> list[tuple[str, int, int]]:
    """The shards of a finished folder as (file name, samples, bytes); BadInput if set.json is not what we write."""
    try:
        listing = json.loads((folder / SET_FILE).read_text("utf-8"))["shards"]
        return [(str(shard["file"]), int(shard["samples"]), int(shard["bytes"])) for shard in listing]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / SET_FILE}: not a listing of shards ({error}); run the import again") from None


def build_index(path: Path) -> np.ndarray:
    """The index of a tar, one row per run of members with one key; BadInput naming the byte if the tar is damaged."""
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for name, offset, size in _members(path):
        match = SAMPLE_NAME.fullmatch(name)
        if not match:
            continue  # WebDataset passes over names without an extension as well
        key, extension = match[1], match[2].lower()
        if not rows or rows[-1][0] != key:
            rows.append((key, {}))
        if extension in rows[-1][1]:
            raise BadInput(f"{path}: two members named {name!r}, the second at byte {offset:,}; rebuild the tar")
        rows[-1][1][extension] = (offset, size)
    return _index_array(path, rows)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each regular file in a tar, which must be whole to its end-of-archive mark."""
    total = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with tarfile.TarFile(fileobj=file) as tar:
                members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
                stopped = tar.offset
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            raise BadInput(
                f"{path}: damaged tar near byte {file.tell():,} of {total:,} ({error}); make it again"
            ) from None
        file.seek(stopped)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadInput(f"{path}: the tar is truncated: it ends at byte {total:,} without its end mark; make it again")
    if any(block):
        raise BadInput(f"{path}: garbage instead of a tar header at byte {stopped:,} of {total:,}; make the tar again")
    return members


def _index_array(path: Path, rows: list[tuple[str, dict[str, tuple[int, int]]]]) -> np.ndarray:
    extensions = sorted({extension for _, spans in rows for extension in spans})
    if len(extensions) > MAX_EXTENSIONS:
        raise BadInput(f"{path}: {len(extensions)} kinds of members; a tar of samples has a few (jpg, txt, json)")
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in rows]
    width = max(map(len, keys), default=1)
    index = np.zeros(len(rows), dtype=[("key", f"S{width}")] + [(name, "<u8", (2,)) for name in extensions])
    index["key"] = keys
    for extension in extensions:
        index[extension] = [spans.get(extension, (0, 0)) for _, spans in rows]
    return index


def _save_index(path: Path, index: np.ndarray) -> None:
    with atomic_open(path) as file:
        np.save(file, index, allow_pickle=False)


def _fits(index: np.ndarray, tar: mmap.mmap | bytes) -> bool:
    """Whether the index ends exactly where the tar does: at the zero block after the last member."""
    names = index.dtype.names or ()
    if not len(index) or names[:1] != ("key",) or any(index.dtype[name].shape != (2,) for name in names[1:]):
        return False
    last = max((index[name][-1].tolist() for name in names[1:]), default=[0, 0])
    end = last[0] + _padded(last[1])
    return tar[end : end + BLOCK] == bytes(BLOCK)


def _map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise BadInput(f"{path}: an empty file, not a tar; make it again") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; has the shard been moved or deleted?") from None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _find_shards(source) -> list[tuple[Path, int | None]]:
    """The shards that `source` means, with their sample counts where a set.json tells them."""
    if not isinstance(source, str | os.PathLike):
        return [shard for part in source for shard in _find_shards(part)]
    path = Path(source)
    if path.is_dir():
        if (path / UNFINISHED_FILE).exists():
            raise BadInput(
                f"{path}: unfinished; run the command that was filling it again, and it goes on where it stopped"
            )
        if (path / SET_FILE).exists():
            return [(path / name, samples) for name, samples, _ in read_set_file(path)]
        return [(tar, None) for tar in sorted(path.glob("*.tar"))]
    if path.is_file():
        return [(path, None)]
    tars = [tar for text in expand_braces(str(source)) for tar in _glob(Path(text))]
    if not tars:
        raise BadInput(f"{source}: no such folder or tar")
    return [(tar, None) for tar in tars]


def _glob(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name)) if "*" in pattern.name else [pattern]


def expand_braces(text: str) -> list[str]:
    """`a-{00..02}.tar` and `{a,b}.tar` written out, as a shell does; numbers keep their leading zeros."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
    choices = [f"{number:0{len(ends[1])}d}" for number in numbers] if ends else match[1].split(",")
    head, tail = text[: match.start()], text[match.end() :]
    return [whole for choice in choices for whole in expand_braces(head + choice + tail)]
