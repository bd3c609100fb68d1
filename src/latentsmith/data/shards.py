"""Indexed shards: plain WebDataset tars in which any sample is one slice of a memory map away.

Beside `shard-000000.tar` lies its index (`tar_index.py`). A finished folder has `set.json`, which names the shards and
counts their samples, so that opening a set reads one small file and maps a shard only when it is touched. A folder
still being filled has `unfinished.json` (`resumable_output.py`) and is refused.
"""

import bisect
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, hash_file
from latentsmith.files.json import check_types, read_json
from latentsmith.files.text import decode_text

from .mirrors import Mirror, MirrorCache, RemoteFile
from .storage import is_remote
from .tar_index import SAMPLE_NAME, Row, build_index, index_array, load_index, padded, refuse_packed, write_index

ShardSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SET_FILE = "set.json"
UNFINISHED_FILE = "unfinished.json"
OPEN_SHARDS = 200
HEADERS_OF_SET, HEADERS_FAR = 64, 3  # samples whose headers are compared with a tar's index


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: its members by extension (`jpg`, `image_encoded.npy`), viewing the mapped file."""

    path: Path  # of the tar
    key: str
    members: Mapping[str, memoryview]

    def __str__(self) -> str:
        return f"{self.path}: sample {self.key!r}"

    def text(self, extension: str) -> str:
        """Return a member as text. Raises BadInput, naming tar and key, if it is none."""
        return decode_text(bytes(self.members[extension]), f"{self}: .{extension}")


RECORD = {"file": str, "samples": int, "bytes": int, "checksum": str}


@dataclass(frozen=True)
class ShardRecord:
    """Entry of set.json for a shard: its file name, samples, bytes, and the fingerprint of those bytes."""

    file: str
    samples: int
    bytes: int
    checksum: str


class Shard:
    """One tar, memory-mapped, with its index; builds the index if there is none or it is of another tar.

    remote: the local copy of a remote set that the tar belongs to; it is fetched if need be. checksum: what set.json
    says of it; its index is then compared with some of the tar's headers, else with all.
    BadInput, naming the tar and the byte, if it is missing, empty, truncated or garbage.
    """

    def __init__(self, path: str | os.PathLike[str], remote: Mirror | None = None, checksum: str = ""):
        self.path, self.checksum = Path(path), checksum
        not_fetched = remote.fetch(self.path.name) if remote else None
        self.bytes: mmap.mmap | RemoteFile = not_fetched or _map_file(self.path)
        self.index = self._open_index()
        self.extensions = tuple(name[1:] for name in (self.index.dtype.names or ())[1:])

    def _open_index(self) -> np.ndarray:
        is_far = isinstance(self.bytes, RemoteFile)  # each header is a request
        rows_checked = HEADERS_FAR if is_far else HEADERS_OF_SET if self.checksum else None
        index = load_index(self.path, self.bytes, rows_checked)
        if index is None:
            index = build_index(self.path, self.bytes.opened() if isinstance(self.bytes, RemoteFile) else None)
            with suppress(OSError):  # in a read-only folder the index lives in memory, and is built again next time
                write_index(self.path, index)
        return index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        key, *spans = self.index[number].tolist()
        held = {name: span for name, span in zip(self.extensions, spans, strict=True) if span[0]}
        if isinstance(self.bytes, RemoteFile):
            members = _read_parts(self.bytes, held)
        else:
            view = memoryview(self.bytes)
            members = {name: view[offset : offset + size] for name, (offset, size) in held.items()}
        return Sample(self.path, key.decode("utf-8", "surrogateescape"), members)

    def key(self, number: int) -> str:
        return bytes(self.index["key"][number]).decode("utf-8", "surrogateescape")


def shards_kept_open() -> int:
    """Return how many shards a set keeps mapped: each holds three file descriptors, and a process has two sets or so.

    The usual limit of a process is 1,024 on Linux and 256 on macOS; Windows has none that can be asked for.
    """
    try:
        import resource
    except ImportError:
        return OPEN_SHARDS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, (limit - 60) // 6))


class ShardSet(Iterable[Sample]):
    """The samples of tar shards, by number or in order.

    source: a finished folder, a folder of WebDataset tars, one tar, a pattern such as `shard-{000..010}.tar` or
    `shard-*.tar`, or a list of these, here or at any address that fsspec opens; mirrors: the cache of
    remote sets. BadInput if there is none, the folder is unfinished, or a tar is damaged.
    Nothing per sample is held in memory; at most `shards_kept_open` are mapped at once. Can be pickled to workers.
    """

    def __init__(self, source: ShardSource, mirrors: MirrorCache | None = None):
        self._mirrors = mirrors or MirrorCache.default()
        shards = _find_shards(source, self._mirrors)
        if not shards:
            raise BadInput(
                f"{source}: no .tar shards here; `latentsmith data import` makes them of images and captions"
            )
        self.paths = [path for path, _ in shards]
        self.records = [record for _, record in shards]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._remote: dict[Path, Mirror | None] = {}  # by folder
        self.counts = [record.samples if record else len(self.shard(i)) for i, record in enumerate(self.records)]
        self._drop_empty(source)
        self._ends = list(accumulate(self.counts))

    def _drop_empty(self, source: Any) -> None:
        """Leave out tars without a sample. Raises BadInput if there is no other."""
        kept = [number for number, count in enumerate(self.counts) if count]
        if not kept:
            raise BadInput(f"{source}: the tars hold no samples")
        if len(kept) < len(self.counts):
            self.paths = [self.paths[number] for number in kept]
            self.records = [self.records[number] for number in kept]
            self.counts = [self.counts[number] for number in kept]
            self._open.clear()

    @property
    def bytes(self) -> int:
        """Return the size of all tars."""
        return sum(record.bytes if record else len(self.shard(i).bytes) for i, record in enumerate(self.records))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        shard, number = self.locate(index)
        return shard[number]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def locate(self, index: int) -> tuple[Shard, int]:
        """Return the shard that holds sample `index`, mapped, and the sample's number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a set of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self.shard(number), index - (self._ends[number] - self.counts[number])

    def shard(self, number: int) -> Shard:
        """Return shard `number`, mapped; BadInput if it has vanished or is not as long as set.json says."""
        shard = self._open.get(number)
        if shard is None:
            path = self.paths[number]
            record = self.records[number]
            shard = Shard(path, self._remote_copy(path.parent), record.checksum if record else "")
            self._open[number] = _checked(shard, record)
            if len(self._open) > shards_kept_open():
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def _remote_copy(self, folder: Path) -> Mirror | None:
        if folder not in self._remote:
            self._remote[folder] = self._mirrors.mirror_at(folder)
        return self._remote[folder]

    def fingerprint(self) -> str:
        """Name the content: the checksums in set.json, or the indexes of tars and their times of change."""
        parts = [
            record.checksum if record else hashlib.blake2b(self.shard(i).index.tobytes()).hexdigest() + self._changed(i)
            for i, record in enumerate(self.records)
        ]
        return fingerprint_text("\n".join(parts))

    def _changed(self, number: int) -> str:
        """Return the time of change of a tar here; a mirror's is that of its last use."""
        path = self.paths[number]
        return "" if self._remote_copy(path.parent) else f" {path.stat().st_mtime_ns}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # maps do not travel; a worker opens its own


class ShardWriter:
    """Write samples into `folder/shard-000000.tar`, ..., each renamed into place, with its index, once it is full.

    start: number of the first shard. shared: extensions whose equal members of a shard are written once; the index
    points all samples to the first. Use as a context manager: an error discards the shard in hand, a clean end
    finishes it. `finished` has a record of each shard completed by this writer.
    """

    def __init__(
        self, folder: str | os.PathLike[str], samples_per_shard: int = 1000, start: int = 0, shared: Sequence[str] = ()
    ):
        self.folder, self.samples_per_shard, self.shared = Path(folder), samples_per_shard, frozenset(shared)
        self.number = start
        self.finished: list[ShardRecord] = []
        self._open: tuple[AbstractContextManager[IO[bytes]], tarfile.TarFile] | None = None
        self._rows: list[Row] = []
        self._written: dict[bytes, tuple[int, int]] = {}  # offset and size of shared members, by their digest

    def write(self, key: str, members: Mapping[str, bytes]) -> bool:
        """Append one sample, its key without a dot; returns whether that completed a shard."""
        assert members and "." not in key and SAMPLE_NAME.fullmatch(f"{key}.x"), key
        if self._open is None:
            aside = atomic_open(self.folder / shard_name(self.number))
            self._open = aside, tarfile.TarFile(fileobj=aside.__enter__(), mode="w")
        spans = {}
        for extension, data in members.items():
            digest = hashlib.blake2b(data).digest() if extension in self.shared else b""
            spans[extension] = self._written.get(digest) or self._append(f"{key}.{extension}", data)
            if digest:
                self._written[digest] = spans[extension]
        self._rows.append((key, spans))
        if is_full := len(self._rows) >= self.samples_per_shard:
            self.finish_shard()
        return is_full

    def _append(self, name: str, data: bytes) -> tuple[int, int]:
        assert self._open is not None
        tar = self._open[1]
        header = tarfile.TarInfo(name)  # no times, no owner: equal samples, equal shards
        header.size = len(data)
        tar.addfile(header, BytesIO(data))
        return tar.offset - padded(len(data)), len(data)

    def finish_shard(self) -> bool:
        """Complete the shard in hand; returns whether there was one."""
        if self._open is None:
            return False
        (aside, tar), path = self._open, self.folder / shard_name(self.number)
        tar.close()
        aside.__exit__(None, None, None)
        write_index(path, index_array(path, self._rows))
        self.finished.append(ShardRecord(path.name, len(self._rows), path.stat().st_size, hash_file(path)))
        self._open, self._rows, self._written = None, [], {}
        self.number += 1
        return True

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            self.finish_shard()
        elif self._open is not None:
            with suppress(error_type):  # atomic_open removes the file and raises the caller's own error again
                self._open[0].__exit__(error_type, error, None)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_set_file(folder: Path, shards: Sequence[ShardRecord], **more: Any) -> None:
    """Mark a folder as finished; `more` is kept in set.json beside the shards, in order."""
    listing = {"samples": sum(shard.samples for shard in shards), "shards": [asdict(shard) for shard in shards]}
    write_text(folder / SET_FILE, json.dumps({"format": "latentsmith-shards-1", **listing, **more}, indent=1) + "\n")


def read_set_file(folder: Path) -> list[ShardRecord]:
    """Return the shards of a finished folder; BadInput if its set.json is not what we write."""
    path, what = folder / SET_FILE, "a listing of shards (delete the folder and make it again)"
    listing = read_json(path, what)
    check_types(listing, {"shards": list}, path, what)
    for shard in listing["shards"]:
        check_types(shard, RECORD, path, what)
    shards = [ShardRecord(**{name: shard[name] for name in RECORD}) for shard in listing["shards"]]
    files = [shard.file for shard in shards]
    outside = [file for file in files if Path(file).name != file or file == ".." or "\0" in file]
    if outside:
        raise BadInput(f"{path}: names {outside[0]!r}, which is not a file beside it; make the set again")
    return shards


def expand_braces(text: str) -> list[str]:
    """Return `a-{00..02}.tar` and `{a,b}.tar` written out, as a shell does; numbers keep their leading zeros."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
    choices = [f"{number:0{len(ends[1])}d}" for number in numbers] if ends else match[1].split(",")
    head, tail = text[: match.start()], text[match.end() :]
    return [whole for choice in choices for whole in expand_braces(head + choice + tail)]


def _checked(shard: Shard, record: ShardRecord | None) -> Shard:
    if record and (len(shard), len(shard.bytes)) != (record.samples, record.bytes):
        was = f"{record.samples:,} samples in {record.bytes:,} bytes"
        now = f"{len(shard):,} in {len(shard.bytes):,}"
        raise BadInput(f"{shard.path}: {now}, but {SET_FILE} counted {was}; the shard has changed: make the set again")
    return shard


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise BadInput(f"{path}: an empty file (0 bytes), not a tar; make it again") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; has the shard been moved or deleted?") from None


def _read_parts(source: RemoteFile, held: Mapping[str, Sequence[int]]) -> dict[str, memoryview]:
    """Read the members of a remote sample: in one request if they lie together, as all but shared members do."""
    first = min(offset for offset, _ in held.values())
    last = max(offset + size for offset, size in held.values())
    if last - first > 2 * sum(size for _, size in held.values()) + 64 * 1024:
        return {name: memoryview(source[offset : offset + size]) for name, (offset, size) in held.items()}
    view = memoryview(source[first:last])
    return {name: view[offset - first : offset - first + size] for name, (offset, size) in held.items()}


def _find_shards(source: ShardSource, mirrors: MirrorCache) -> list[tuple[Path, ShardRecord | None]]:
    """Return the shards that `source` means, each with its record where a set.json has one."""
    if not isinstance(source, str | os.PathLike):
        return [shard for part in source for shard in _find_shards(part, mirrors)]
    if is_remote(source):
        return [shard for url in expand_braces(str(source)) for shard in _folder_shards(mirrors.mirror(url), mirrors)]
    path = Path(source)
    if path.is_dir():
        return _folder_shards(path, mirrors)
    if path.is_file():
        return [(path, None)]
    tars = [tar for text in expand_braces(str(source)) for tar in _glob(Path(text))]
    if not tars or tars == [path]:
        raise BadInput(f"{source}: no such folder or tar")
    return [(tar, None) for tar in tars]


def _folder_shards(folder: Path, mirrors: MirrorCache) -> list[tuple[Path, ShardRecord | None]]:
    if (folder / UNFINISHED_FILE).exists():
        raise BadInput(f"{folder}: unfinished; run the command that filled it again, and it goes on where it stopped")
    if (folder / SET_FILE).exists():
        return [(folder / record.file, record) for record in read_set_file(folder)]
    remote = mirrors.mirror_at(folder)
    if remote is None:
        refuse_packed(folder, (path.name for path in folder.iterdir()))
    return [(tar, None) for tar in (remote.tars if remote else sorted(folder.glob("*.tar")))]


def _glob(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name)) if "*" in pattern.name else [pattern]
