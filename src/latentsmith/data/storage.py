"""Read data from a folder here (LocalStorage) or at any address that fsspec opens (RemoteStorage), such as `s3://`,
`gs://`, `https://` or `memory://`.
"""

import os
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import IMAGE, TABLE, NotRegular, SizeLimit, TooLarge, open_regular, read_regular

from .errors import BadSample
from .tar_index import JUNK

PREFETCH = 64  # remote files that are requested together
OUTSIDE = "outside the source folder"  # the reason by which refusals are counted
MAX_LINKED_FOLDERS = 100_000  # links that cross each other can make 2**n names of n folders
PATTERN = frozenset("*?[")  # what fsspec takes for a pattern in a list of names
CHANGE_KEYS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated", "created")  # of fsspec
TRIES = 4  # of one request; the waits between them double from half a second


@dataclass(frozen=True)
class Access:
    """Permission to read other files than those in the source folder.

    follow_links: the files and folders out of it that links in it lead to. allow_outside: table entries that are
    absolute paths or use `..`.
    """

    follow_links: bool = False
    allow_outside: bool = False


INSIDE = Access()


class Storage:
    """Base class of a folder of files; names are posix paths below it.

    address: the folder's name in errors. refused: the linked folders that `sizes` left out.
    """

    def __init__(self, address: str, access: Access):
        self.address, self.access = address, access
        self.refused: list[str] = []
        self.states: dict[str, str] = {}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file at any depth, without hidden ones and what systems leave beside files.

        `states` has what tells a changed file of each: its size, and its time of change or what a server says.
        """
        raise NotImplementedError

    def state(self, name: str) -> str:
        """Return what tells whether a file has changed, as `states` has it."""
        raise NotImplementedError

    def head(self, name: str, size: int) -> bytes:
        """Return the first bytes of a file, where that costs no request; nothing if it may not be read."""
        return b""

    def exists(self, name: str) -> bool:
        raise NotImplementedError

    def open(self, name: str) -> BinaryIO:
        """Open a table. Raises BadInput if it may not be read, OSError if it cannot be."""
        raise NotImplementedError

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        """Return a file's bytes. Raises BadSample if there is none, it cannot be read, or has more than `limit`."""
        raise NotImplementedError

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch the files that will be read next, where that saves time."""


class LocalStorage(Storage):
    """A folder of this machine. Files out of it are read only as `access` allows.

    named: a file in it that the user named, which may be a link to any file.
    """

    def __init__(self, folder: Path, access: Access = INSIDE, named: str | None = None):
        super().__init__(str(folder), access)
        self.folder, self.named, self.root = folder, named, os.path.realpath(folder)

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        self.refused, links = [], 0
        # A folder's name, its real path, and the real paths of the folders with the links that led to it.
        waiting: list[tuple[str, str, tuple[str, ...]]] = [("", self.root, ())]
        while waiting:
            below, real, chain = waiting.pop()
            for entry in _entries(os.path.join(self.folder, below)):
                name = f"{below}{entry.name}"
                if is_hidden(entry.name):
                    continue
                if not _is_folder(entry):
                    found[name] = 0  # of a link to nothing
                    with suppress(OSError):
                        found[name], self.states[name] = entry.stat().st_size, _local_state(entry.stat())
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

    def state(self, name: str) -> str:
        return _local_state(os.stat(self.folder / name))

    def head(self, name: str, size: int) -> bytes:
        with suppress(BadInput, OSError), open_regular(self.resolve(name)) as file:
            return file.read(size)
        return b""

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.resolve(name), TABLE, self.folder / name)

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        path = self.folder / name
        try:
            return read_regular(self.resolve(name), limit, path)
        except BadSample:
            raise
        except NotRegular as error:
            raise BadSample("not a regular file", str(error)) from None
        except TooLarge as error:
            raise BadSample("too many bytes", str(error)) from None
        except (OSError, ValueError) as error:
            reason = "missing image" if not os.path.lexists(path) else "unreadable file"
            raise BadSample(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from None

    def resolve(self, name: str) -> str:
        """Return a file's real path, without links. Raises BadSample if it may not be read."""
        path = os.path.realpath(self.folder / name)
        if name == self.named:
            return path
        if leads_out(name):
            check_entry(name, self.access)
        elif not self.access.follow_links and not is_within(path, self.root):
            raise link_refused(str(self.folder / name))
        return path


class RemoteStorage(Storage):
    """A folder at an address that fsspec opens.

    A file that is not there is a BadSample. Network and server errors raise BadInput after retries: they do not mean
    the sample is bad.
    """

    def __init__(self, url: str, access: Access = INSIDE):
        super().__init__(url.rstrip("/") if not url.endswith("://") else url, access)
        self.listed: dict[str, int] = {}
        self.prefetched: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        with errors_reported(self.address):
            system, root = file_system(self.address)
            found = with_retries(lambda: system.find(root, detail=True))
        below = {path.removeprefix(root).lstrip("/"): info.get("size") or 0 for path, info in found.items()}
        self.listed = {n: size for n, size in below.items() if not any(map(is_hidden, PurePosixPath(n).parts))}
        states = {path.removeprefix(root).lstrip("/"): _remote_state(info) for path, info in found.items()}
        self.states = {name: states[name] for name in self.listed}
        return self.listed

    def state(self, name: str) -> str:
        return _remote_state(self.request(name, lambda system, path: system.info(path)) or {})

    def exists(self, name: str) -> bool:
        return self.request(name, lambda system, path: system.info(path)) is not None

    def is_folder(self) -> bool:
        info = self.request("", lambda system, path: system.info(path))
        return info is not None and info["type"] == "directory"

    def open(self, name: str) -> BinaryIO:
        file: BinaryIO | None = self.request(name, lambda system, path: system.open(path, "rb"))
        if file is None:
            raise BadInput(f"{self.address}/{name}: no such file")
        return file

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        data, size = self.prefetched.pop(name, None), self.listed.get(name, 0)
        if data is None and size <= limit.size:
            data = self.fetch(name)
            if data is None:
                raise BadSample("missing image", f"{self.address}/{name}: No such file")
        if data is None or len(data) > limit.size:
            size = size if data is None else len(data)
            too_many = f"{size:,} bytes, more than the {limit.size:,} allowed for {limit.use}"
            raise BadSample("too many bytes", f"{self.address}/{name}: {too_many}")
        return data

    def fetch(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes of a file from `start` to `end`; None if there is no such file."""
        data: bytes | None = self.request(name, lambda system, path: system.cat_file(path, start=start, end=end))
        return data

    def prefetch(self, names: Sequence[str]) -> None:
        """Request several files at once. `read` asks again for what does not come, and reports it."""
        with errors_reported(self.address):
            system, _ = file_system(self.address)
            paths = {name: self._path(name)[1] for name in names if self._can_prefetch(name)}
            answers = system.cat(list(paths.values()), on_error="return") if paths else {}
        self.prefetched = {name: data for name, path in paths.items() if isinstance(data := answers.get(path), bytes)}

    def request(self, name: str, ask: Callable[[Any, str], Any]) -> Any:
        """Return what `ask(file system, path)` returns for a file; None if there is no such file."""
        with errors_reported(f"{self.address}/{name}".rstrip("/")):
            system, path = self._path(name)
            try:
                return with_retries(lambda: ask(system, path))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def _can_prefetch(self, name: str) -> bool:
        allowed = self.access.allow_outside or not leads_out(name)
        return allowed and not PATTERN.intersection(name) and self.listed.get(name, 0) <= IMAGE.size

    def _path(self, name: str) -> tuple[Any, str]:
        """Return the file system and a file's path in it. Raises BadSample if the file may not be read."""
        check_entry(name, self.access)
        system, root = file_system(self.address)  # not kept: after a fork it has to be another
        path = f"{root}/{name}" if name else root
        return system, without_dots(path) if {".", ".."} & set(name.split("/")) else path


def storage_at(path: str | os.PathLike[str], access: Access = INSIDE, named: str | None = None) -> Storage:
    """Return the storage of a folder at a path or an address."""
    return RemoteStorage(str(path), access) if is_remote(path) else LocalStorage(Path(path), access, named)


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and "://" in path


def link_refused(path: str) -> BadSample:
    return BadSample(OUTSIDE, f"{path}: a link out of the source folder; --follow-links reads it")


def check_entry(name: str, access: Access) -> None:
    """Raise BadSample for a name that may lead out of its folder, unless that is allowed."""
    if leads_out(name) and not access.allow_outside:
        what = "is an absolute path" if ".." not in name else 'has ".." in it'
        may = f"{what}, which may be outside the source folder; --allow-outside reads it"
        raise BadSample(OUTSIDE, f"{name}: {may}")


def leads_out(name: str) -> bool:
    """Return whether a name is an absolute path or has a part `..`, here or on Windows."""
    parts = name.replace("\\", "/").split("/")
    return (parts[0] == "" and name != "") or parts[0][1:] == ":" or ".." in parts


def is_within(path: str, folder: str) -> bool:
    """Return whether a real path is that of a folder or of something in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _local_state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _remote_state(info: Mapping[str, Any]) -> str:
    """Return a file's size and the first of what servers say of its content or time of change."""
    said = (str(info[key]) for key in CHANGE_KEYS if info.get(key))
    return f"{info.get('size')} {next(said, '')}"


def without_dots(path: str) -> str:
    """Return a path without `.` and `..`, behind its protocol if it has one."""
    protocol, mark, rest = path.rpartition("://")
    return protocol + mark + posixpath.normpath(rest)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return list(entries)
    return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # links that lead to each other
        return entry.is_dir()
    return False


# ---- Requests ----


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it."""
    import fsspec.core

    system, path = fsspec.core.url_to_fs(url)
    return system, path


@contextmanager
def errors_reported(url: str) -> Iterator[None]:
    """Raise the errors of any file system behind fsspec as BadInput that names the address."""
    try:
        yield
    except BadInput:
        raise
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise BadInput(f"{url}: {error}") from None
    except Exception as error:  # every protocol has errors of its own
        raise BadInput(f"{url}: cannot be read ({type(error).__name__}: {error})") from None


def with_retries(request: Callable[[], Any]) -> Any:
    """Return what a request returns, repeated a few times if the network fails or the server is busy.

    FileNotFoundError means that there is no such file, not that the server could not be reached.
    """
    for wait in (*(0.5 * 2**i for i in range(TRIES - 1)), None):
        try:
            return request()
        except Exception as error:
            cause = error.__cause__  # over HTTP fsspec raises FileNotFoundError for whatever went wrong
            hidden = isinstance(error, FileNotFoundError) and _is_network_error(cause)
            real = cause if cause and hidden and getattr(cause, "status", None) not in (404, 410) else error
            if wait is None or not is_transient(real):
                raise real from None
            time.sleep(wait)
    raise AssertionError


def is_transient(error: BaseException) -> bool:
    """Return whether a request that failed so may succeed a moment later."""
    if status := getattr(error, "status", None):
        return status >= 500 or status in (408, 425, 429)
    is_final = isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError)
    return not is_final and (isinstance(error, OSError) or _is_network_error(error))


def _is_network_error(error: BaseException | None) -> bool:
    return isinstance(error, TimeoutError) or type(error).__module__.startswith("aiohttp")
