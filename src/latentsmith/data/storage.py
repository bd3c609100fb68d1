"""Where data lies: a folder here (LocalStorage) or at any address that fsspec opens (RemoteStorage), and local mirrors
of remote sets.
"""

import json
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any, BinaryIO, Protocol

from latentsmith.files.atomic import write_bytes, write_text
from latentsmith.files.cache_folder import user_cache
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.regular import IMAGE, TABLE, NotRegular, SizeLimit, TooLarge, open_regular, read_regular

from .errors import BadSample

PREFETCH = 64  # files that are asked for at once from afar
OUTSIDE = "outside the source folder"  # the reason by which refusals are counted
MAX_LINKED_FOLDERS = 100_000  # links that cross each other can make 2**n names of n folders
PATTERN = frozenset("*?[")  # what fsspec takes for a pattern in a list of names


class Storage(Protocol):
    """Files by name. `address` is the folder's name in errors, `refused` the linked folders that `sizes` left out."""

    address: str
    refused: list[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file at any depth, without hidden ones and what macOS puts beside files in archives."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> BinaryIO:
        """Open a table. Raises BadInput if it may not be read, OSError if it cannot be."""

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        """Return a file's bytes. Raises BadSample if there is none, it cannot be read, or has more than `limit`."""

    def prefetch(self, names: Sequence[str]) -> None:
        """These will be read next."""


@dataclass(frozen=True)
class Access:
    """What may be read besides the files in the source folder.

    follow_links: the files and folders out of it that links in it lead to. allow_outside: table entries that are
    absolute paths or use `..`.
    """

    follow_links: bool = False
    allow_outside: bool = False


INSIDE = Access()


class LocalStorage:
    """A folder of this machine. Files out of it are read only as `access` allows; `given` is a file in it that the user
    named, which may be a link to any place."""

    def __init__(self, folder: Path, access: Access = INSIDE, given: str | None = None):
        self.folder, self.address = folder, str(folder)
        self.access, self.given = access, given
        self.refused: list[str] = []
        self.root = os.path.realpath(folder)

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        self.refused, links = [], 0
        # A folder's name, its real path, and the real paths of the folders with the links that led to it.
        waiting: list[tuple[str, str, tuple[str, ...]]] = [("", self.root, ())]
        while waiting:
            below, real, chain = waiting.pop()
            for entry in _entries(os.path.join(self.folder, below)):
                name = f"{below}{entry.name}"
                if hidden(entry.name):
                    continue
                if not _is_folder(entry):
                    found[name] = 0  # of a link to nothing
                    with suppress(OSError):
                        found[name] = entry.stat().st_size
                elif not entry.is_symlink():
                    waiting.append((f"{name}/", os.path.join(real, entry.name), chain))
                else:
                    target = os.path.realpath(entry.path)
                    if not self.access.follow_links and not is_within(target, self.root):
                        self.refused.append(name)
                    elif not any(is_within(folder, target) for folder in (*chain, real)):  # else a loop
                        links += 1
                        waiting.append((f"{name}/", target, (*chain, real)))
            if links > MAX_LINKED_FOLDERS:
                raise BadInput(f"{self.address}: more than {MAX_LINKED_FOLDERS:,} links to folders; remove some")
        self.refused.sort()
        return found

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.resolved(name), TABLE, self.folder / name)

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        path = self.folder / name
        try:
            return read_regular(self.resolved(name), limit, path)
        except BadSample:
            raise
        except NotRegular as error:
            raise BadSample("not a regular file", str(error)) from None
        except TooLarge as error:
            raise BadSample("too many bytes", str(error)) from None
        except (OSError, ValueError) as error:
            reason = "missing image" if not os.path.lexists(path) else "unreadable file"
            raise BadSample(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from None

    def resolved(self, name: str) -> str:
        """Return a file's real path, without links. Raises BadSample if it may not be read."""
        path = os.path.realpath(self.folder / name)
        if name == self.given or (self.access.allow_outside and leads_out(name)):
            return path
        if leads_out(name):
            raise entry_refused(name)
        if not self.access.follow_links and not is_within(path, self.root):
            raise link_refused(str(self.folder / name))
        return path

    def prefetch(self, names: Sequence[str]) -> None:
        pass


def link_refused(path: str) -> BadSample:
    return BadSample(OUTSIDE, f"{path}: a link out of the source folder; --follow-links reads it")


def entry_refused(name: str) -> BadSample:
    what = "is an absolute path" if name.startswith("/") else 'has ".." in it'
    return BadSample(OUTSIDE, f"{name}: {what}, which may be outside the source folder; --allow-outside reads it")


def leads_out(name: str) -> bool:
    """Whether a name is an absolute path or has a part `..`."""
    return name.startswith("/") or ".." in name.split("/")


def is_within(path: str, folder: str) -> bool:
    """Whether a real path is that of a folder or of something in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return list(entries)
    return []


def _is_folder(entry: os.DirEntry) -> bool:
    with suppress(OSError):  # links that lead to each other
        return entry.is_dir()
    return False


class RemoteStorage:
    """A folder at an address that fsspec opens. A file that is not there is a BadSample; what the network or the
    server refuses, after some tries, is BadInput: it says nothing of the sample."""

    def __init__(self, url: str, access: Access = INSIDE):
        self.address = url.rstrip("/") if not url.endswith("://") else url
        self.access = access
        self.refused: list[str] = []
        self.listed: dict[str, int] = {}
        self.prefetched: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        with reported(self.address):
            system, root = file_system(self.address)
            found = with_retries(lambda: system.find(root, detail=True))
        below = {path.removeprefix(root).lstrip("/"): about.get("size") or 0 for path, about in found.items()}
        self.listed = {n: size for n, size in below.items() if not any(map(hidden, PurePosixPath(n).parts))}
        return self.listed

    def has(self, name: str) -> bool:
        with reported(self.address):
            system, path = self._found(name)
            with suppress(FileNotFoundError):
                return bool(with_retries(lambda: system.info(path)))
        return False

    def open(self, name: str) -> BinaryIO:
        with reported(f"{self.address}/{name}"):
            system, path = self._found(name)
            return with_retries(lambda: system.open(path, "rb"))

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        data = self.prefetched.pop(name, None)
        if data is None and self.listed.get(name, 0) <= limit.size:
            with reported(f"{self.address}/{name}"):
                system, path = self._found(name)
                with suppress(FileNotFoundError, IsADirectoryError):
                    data = with_retries(lambda: system.cat_file(path))
            if data is None:
                raise BadSample("missing image", f"{self.address}/{name}: No such file")
        size = self.listed[name] if data is None else len(data)
        if data is None or size > limit.size:
            too_many = f"{size:,} bytes, more than the {limit.size:,} allowed for {limit.use}"
            raise BadSample("too many bytes", f"{self.address}/{name}: {too_many}")
        return data

    def prefetch(self, names: Sequence[str]) -> None:
        """Ask for them all at once. What does not come is asked for again, and told of, when it is read."""
        with reported(self.address):
            system, _ = file_system(self.address)
            wanted = [name for name in names if self._can_prefetch(name)]
            paths = {name: self._found(name)[1] for name in wanted}
            answers = system.cat(list(paths.values()), on_error="return") if paths else {}
        self.prefetched = {name: data for name, path in paths.items() if isinstance(data := answers.get(path), bytes)}

    def _can_prefetch(self, name: str) -> bool:
        """Whether a file can be fetched with others."""
        refused = leads_out(name) and not self.access.allow_outside
        return not refused and not PATTERN.intersection(name) and self.listed.get(name, 0) <= IMAGE.size

    def _found(self, name: str) -> tuple[Any, str]:
        """The file system, and a file's path in it. Raises BadSample if it may not be read."""
        if leads_out(name) and not self.access.allow_outside:
            raise entry_refused(name)
        system, root = file_system(self.address)  # asked for each time: after a fork it is another
        path = f"{root}/{name}"
        return system, resolved(path) if {".", ".."} & set(name.split("/")) else path


def resolved(path: str) -> str:
    """A path without `.` and `..`, behind its protocol if it has one."""
    protocol, mark, rest = path.rpartition("://")
    return protocol + mark + posixpath.normpath(rest)


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


REMOTE_FILE = "remote.json"
SMALL_FILES = ("set.json", "cache.json", "empty_prompt.npy", "buckets.npy")
TAR_NAME = re.compile(r"[^/\\\0]+\.tar")  # a file beside remote.json, never a path
NAME_LENGTH = 24  # hex digits
TRIES = 4  # of one request; the waits between them double from half a second
GIB = 2**30


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and "://" in path


@dataclass(frozen=True)
class MirrorCache:
    """The local cache of remote sets: its folder, and how many bytes of tars it holds at most.

    Each remote set has a folder directly below `folder`. A `remote.json` anywhere else is data and is never obeyed.
    """

    folder: Path
    limit: int = 50 * GIB

    @classmethod
    def default(cls) -> "MirrorCache":
        """Return the cache in $LATENTSMITH_DATA_CACHE, or in `latentsmith/data` of the user's cache folder."""
        return cls(Path(os.environ.get("LATENTSMITH_DATA_CACHE") or user_cache("data")))

    def mirror(self, url: str) -> Path:
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
        if self.mirror_at(folder) is None:
            for name, data in small.items():
                write_bytes(folder / name, data)
            write_text(folder / REMOTE_FILE, json.dumps({"url": parent, "tars": tars}) + "\n")
        return folder

    def mirror_at(self, folder: Path) -> "Mirror | None":
        """Return the copy that `mirror` made in `folder`; None for any other folder.

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
            return Mirror(self, folder, url, {name: int(size) for name, (size, _) in tars.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # the last: a loop of links
            return None

    def make_room(self, size: int) -> None:
        """Delete the tars touched least recently until `size` more bytes fit within the limit.

        Only regular files that the remote.json of a folder made here lists are counted and deleted.
        """
        found = []
        for copy in filter(None, map(self.mirror_at, self.folder.iterdir())):
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
class Mirror:
    """A folder of the local cache that stands for the remote folder `url`. sizes: bytes of each of its tars, by name.

    Comes from `MirrorCache.mirror_at` alone, which checks that the cache made the folder.
    """

    mirrors: MirrorCache
    folder: Path
    url: str
    sizes: Mapping[str, int]

    @property
    def tars(self) -> list[Path]:
        """The paths of its tars, fetched or not, sorted by name."""
        return [self.folder / name for name in sorted(self.sizes)]

    def fetch(self, name: str) -> "RemoteFile | None":
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
            if sum(self.sizes.values()) > self.mirrors.limit:
                return RemoteFile(url, self.sizes[name])
            if path.exists():
                os.utime(path)
                return None
            self.mirrors.make_room(self.sizes[name])
            aside = path.with_name(f"{name}.{os.getpid()}.fetching")
            try:
                with_retries(lambda: file_system(url)[0].get_file(file_system(url)[1], str(aside)))
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return None


def _fingerprint(url: str, tars: Mapping[str, tuple[int, str]], listing: bytes) -> str:
    """Name of the local folder of a remote set. tars: (bytes, state) by name. listing: its set.json, or nothing."""
    return fingerprint_text(json.dumps([url, tars]) + listing.decode())[:NAME_LENGTH]


class RemoteFile(Sequence):
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
            return with_retries(lambda: system.cat_file(path, start=start, end=stop))

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
        return with_retries(lambda: system.cat_file(path))
    except FileNotFoundError:
        return None


def _tars(pattern: str) -> dict[str, tuple[int, str]]:
    """Bytes of the tars that a pattern names, or one name, and what tells whether each has changed."""
    system, path = file_system(pattern)
    found = {}
    for one in sorted(system.glob(path)) if "*" in path else [path]:
        size, state = with_retries(partial(system.size, one)), with_retries(partial(system.ukey, one))
        found[PurePosixPath(one).name] = (int(size), str(state))
    return found


def with_retries(request: Any) -> Any:
    """What a request answers; asked again a few times if the network fails or the server is busy. FileNotFoundError
    means that there is no such file, not that nobody could be asked."""
    for wait in (*(0.5 * 2**i for i in range(TRIES - 1)), None):
        try:
            return request()
        except Exception as error:
            cause = error.__cause__  # over HTTP fsspec has FileNotFoundError for whatever went wrong
            unknown = isinstance(error, FileNotFoundError) and _is_network_error(cause)
            real = cause if cause and unknown and getattr(cause, "status", None) not in (404, 410) else error
            if wait is None or not is_transient(real):
                raise real from None
            time.sleep(wait)
    raise AssertionError


def _is_network_error(error: BaseException | None) -> bool:
    """Whether an error is one of talking to a server."""
    return isinstance(error, TimeoutError) or type(error).__module__.startswith("aiohttp")


def is_transient(error: BaseException) -> bool:
    """Whether a request that failed so may succeed a moment later."""
    if status := getattr(error, "status", None):
        return status >= 500 or status in (408, 425, 429)
    gone = isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError)
    return not gone and (isinstance(error, OSError) or _is_network_error(error))
