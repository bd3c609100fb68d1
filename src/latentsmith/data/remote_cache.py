"""Sets that lie where fsspec reaches: `s3://`, `gs://`, `https://`, `memory://` and the like.

A folder in the local cache stands for the remote one: its small files are there, with `remote.json`, which says where
the tars are. A set that fits into the cache has its tars fetched whole, each when it is first touched; of a larger one
samples are read as ranges of bytes. Tars touched least recently give way to new ones. Only folders that the cache made
are filled and emptied: a `remote.json` found elsewhere is ignored.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

from latentsmith.files.atomic import write_bytes, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text

REMOTE_FILE = "remote.json"
SMALL_FILES = ("set.json", "cache.json", "empty_prompt.npy", "buckets.npy")
TAR_NAME = re.compile(r"[^/\\\0]+\.tar")  # a file beside remote.json, never a path
NAME_LENGTH = 24  # hex digits
TRIES = 4  # of one request; the waits between them double from half a second
GIB = 2**30


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and "://" in path


@dataclass(frozen=True)
class LocalCopies:
    """The local cache of remote sets: its folder, and how many bytes of tars it holds at most.

    Each remote set has a folder directly below `folder`. A `remote.json` anywhere else is data and is never obeyed.
    """

    folder: Path
    limit: int = 50 * GIB

    @classmethod
    def default(cls) -> "LocalCopies":
        """Return the cache in $LATENTSMITH_DATA_CACHE, or in `latentsmith/data` of the user's cache folder."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(os.environ.get("LATENTSMITH_DATA_CACHE") or cache / "latentsmith" / "data"))

    def stand_in(self, url: str) -> Path:
        """Make a local folder for the remote folder `url`, or for some tars in it named by a pattern.

        The folder's name is a fingerprint of the content: a set that has changed gets another folder. BadInput if there
        is nothing at `url`.
        """
        head, _, last = url.rstrip("/").rpartition("/")
        parent = head if "*" in last or last.endswith(".tar") else url.rstrip("/")
        small: dict[str, bytes] = {}
        with reported(url):
            if parent == head:
                tars = _tars(url)
            elif listed := _read(f"{parent}/set.json"):
                tars = {shard["file"]: (int(shard["bytes"]), "") for shard in json.loads(listed)["shards"]}
                small = {name: data for name in SMALL_FILES if (data := _read(f"{parent}/{name}")) is not None}
            elif _read(f"{parent}/unfinished.json") is not None:
                raise BadInput(f"{url}: unfinished; run the command that filled it again, then copy it")
            else:
                tars = _tars(f"{parent}/*.tar")
            if outside := [name for name in tars if not TAR_NAME.fullmatch(name)]:
                raise BadInput(f"{url}: names {outside[0]!r}, which is not a .tar beside it")
        if not tars:
            raise BadInput(f"{url}: no set.json and no .tar shards here")
        folder = self.folder / _fingerprint(parent, tars, small.get("set.json", b""))
        if folder.is_symlink():
            raise BadInput(f"{folder}: a symbolic link in the cache of remote sets; delete it")
        if self.copy_in(folder) is None:
            for name, data in small.items():
                write_bytes(folder / name, data)
            write_text(folder / REMOTE_FILE, json.dumps({"url": parent, "tars": tars}) + "\n")
        return folder

    def copy_in(self, folder: Path) -> "RemoteCopy | None":
        """Return the copy that `stand_in` made in `folder`; None for any other folder.

        Proof that it was made here: it lies directly below the cache folder, not through a symbolic link, and its name
        is the fingerprint of what its remote.json and set.json say.
        """
        try:
            if len(folder.name) != NAME_LENGTH or folder.resolve() != self.folder.resolve() / folder.name:
                return None
            about = json.loads((folder / REMOTE_FILE).read_text("utf-8"))
            url, tars = about["url"], {name: (size, state) for name, (size, state) in about["tars"].items()}
            listing = folder / "set.json"
            is_ours = folder.name == _fingerprint(url, tars, listing.read_bytes() if listing.exists() else b"")
            if not is_ours or not all(TAR_NAME.fullmatch(name) for name in tars):
                return None
            return RemoteCopy(self, folder, url, {name: int(size) for name, (size, _) in tars.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # the last: a loop of links
            return None

    def make_room(self, size: int) -> None:
        """Delete the tars touched least recently until `size` more bytes fit within the limit.

        Only regular files that the remote.json of a folder made here lists are counted and deleted.
        """
        found = []
        for copy in filter(None, map(self.copy_in, self.folder.iterdir())):
            for path in (copy.folder / name for name in copy.sizes):
                with suppress(FileNotFoundError):  # not fetched, or another process makes room too
                    stat = path.lstat()
                    if S_ISREG(stat.st_mode):
                        found.append((stat.st_mtime, stat.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, freed, path in sorted(found):
            if held + size <= self.limit:
                return
            path.unlink(missing_ok=True)  # a process that has it mapped keeps its bytes
            held -= freed


@dataclass(frozen=True)
class RemoteCopy:
    """A folder of the local cache that stands for the remote folder `url`. sizes: bytes of each of its tars, by name.

    Comes from `LocalCopies.copy_in` alone, which checks that the cache made the folder.
    """

    copies: LocalCopies
    folder: Path
    url: str
    sizes: Mapping[str, int]

    @property
    def tars(self) -> list[Path]:
        """The paths of its tars, fetched or not, sorted by name."""
        return [self.folder / name for name in sorted(self.sizes)]

    def fetch(self, name: str) -> "Ranges | None":
        """Fetch a tar whole and return None; of a set larger than the cache's limit return its bytes as ranges.

        Its index is fetched too. A name that the set does not list is left alone. BadInput if it cannot be read.
        """
        if name not in self.sizes:
            return None
        url, path = f"{self.url}/{name}", self.folder / name
        index = path.with_suffix(".index.npy")
        with reported(url):
            if not index.exists() and (data := _read(f"{self.url}/{index.name}")) is not None:
                write_bytes(index, data)
            if sum(self.sizes.values()) > self.copies.limit:
                return Ranges(url, self.sizes[name])
            if path.exists():
                os.utime(path)
                return None
            self.copies.make_room(self.sizes[name])
            aside = path.with_name(f"{name}.{os.getpid()}.fetching")
            try:
                attempted(lambda: file_system(url)[0].get_file(file_system(url)[1], str(aside)))
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return None


def _fingerprint(url: str, tars: Mapping[str, tuple[int, str]], listing: bytes) -> str:
    """Name of the local folder of a remote set. tars: (bytes, state) by name. listing: its set.json, or nothing."""
    return fingerprint_text(json.dumps([url, tars]) + listing.decode())[:NAME_LENGTH]


class Ranges(Sequence):
    """The bytes of a remote file, each slice a request. Errors as `reported`."""

    def __init__(self, url: str, size: int):
        self.url, self.size = url, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        assert isinstance(index, slice) and index.step is None
        start, stop, _ = index.indices(self.size)
        if start >= stop:
            return b""
        with reported(self.url):
            system, path = file_system(self.url)  # asked for each time: after a fork it is another
            return attempted(lambda: system.cat_file(path, start=start, end=stop))

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The whole as a file to read and seek in."""
        with reported(self.url):
            system, path = file_system(self.url)
            with system.open(path, "rb") as file:
                yield file


@contextmanager
def reported(url: str) -> Iterator[None]:
    """Errors of any file system behind fsspec as BadInput that names the address."""
    try:
        yield
    except BadInput:
        raise
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise BadInput(f"{url}: {error}") from None
    except Exception as error:  # every protocol has errors of its own
        raise BadInput(f"{url}: cannot be read ({type(error).__name__}: {error})") from None


def file_system(url: str) -> tuple[Any, str]:
    import fsspec.core

    return fsspec.core.url_to_fs(url)


def _read(url: str) -> bytes | None:
    """A small file; None if there is none."""
    system, path = file_system(url)
    try:
        return attempted(lambda: system.cat_file(path))
    except FileNotFoundError:
        return None


def _tars(pattern: str) -> dict[str, tuple[int, str]]:
    """Bytes of the tars that a pattern names, or one name, and what tells whether each has changed."""
    system, path = file_system(pattern)
    found = {}
    for one in sorted(system.glob(path)) if "*" in path else [path]:
        size, state = attempted(partial(system.size, one)), attempted(partial(system.ukey, one))
        found[PurePosixPath(one).name] = (int(size), str(state))
    return found


def attempted(request: Any) -> Any:
    """What a request answers; asked again a few times if the network fails or the server is busy. FileNotFoundError
    means that there is no such file, not that nobody could be asked."""
    for wait in (*(0.5 * 2**i for i in range(TRIES - 1)), None):
        try:
            return request()
        except Exception as error:
            cause = error.__cause__  # over HTTP fsspec has FileNotFoundError for whatever went wrong
            unknown = isinstance(error, FileNotFoundError) and of_network(cause)
            real = cause if cause and unknown and getattr(cause, "status", None) not in (404, 410) else error
            if wait is None or not passing(real):
                raise real from None
            time.sleep(wait)
    raise AssertionError


def of_network(error: BaseException | None) -> bool:
    """Whether an error is one of talking to a server."""
    return isinstance(error, TimeoutError) or type(error).__module__.startswith("aiohttp")


def passing(error: BaseException) -> bool:
    """Whether a request that failed so may succeed a moment later."""
    if status := getattr(error, "status", None):
        return status >= 500 or status in (408, 425, 429)
    gone = isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError)
    return not gone and (isinstance(error, OSError) or of_network(error))
