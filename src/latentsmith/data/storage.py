"""Where the files of a source lie: a folder here, or any address that fsspec opens. Names are posix paths below it."""

import os
import posixpath
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import IMAGE, TABLE, NotRegular, SizeLimit, TooLarge, open_regular, read_regular

from .errors import BadSample
from .remote_cache import attempted, file_system, reported

AHEAD = 64  # files that are asked for at once from afar
OUTSIDE = "outside the source folder"  # the reason by which refusals are counted
MAX_LINKED_FOLDERS = 100_000  # links that cross each other can make 2**n names of n folders
PATTERN = frozenset("*?[")  # what fsspec takes for a pattern in a list of names


class Place(Protocol):
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

    def ahead(self, names: Sequence[str]) -> None:
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


class Here:
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

    def ahead(self, names: Sequence[str]) -> None:
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


class Far:
    """A folder at an address that fsspec opens. A file that is not there is a BadSample; what the network or the
    server refuses, after some tries, is BadInput: it says nothing of the sample."""

    def __init__(self, url: str, access: Access = INSIDE):
        self.address = url.rstrip("/") if not url.endswith("://") else url
        self.access = access
        self.refused: list[str] = []
        self.listed: dict[str, int] = {}
        self.came: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        with reported(self.address):
            system, root = file_system(self.address)
            found = attempted(lambda: system.find(root, detail=True))
        below = {path.removeprefix(root).lstrip("/"): about.get("size") or 0 for path, about in found.items()}
        self.listed = {n: size for n, size in below.items() if not any(map(hidden, PurePosixPath(n).parts))}
        return self.listed

    def has(self, name: str) -> bool:
        with reported(self.address):
            system, path = self._found(name)
            with suppress(FileNotFoundError):
                return bool(attempted(lambda: system.info(path)))
        return False

    def open(self, name: str) -> BinaryIO:
        with reported(f"{self.address}/{name}"):
            system, path = self._found(name)
            return attempted(lambda: system.open(path, "rb"))

    def read(self, name: str, limit: SizeLimit = IMAGE) -> bytes:
        data = self.came.pop(name, None)
        if data is None and self.listed.get(name, 0) <= limit.size:
            with reported(f"{self.address}/{name}"):
                system, path = self._found(name)
                with suppress(FileNotFoundError, IsADirectoryError):
                    data = attempted(lambda: system.cat_file(path))
            if data is None:
                raise BadSample("missing image", f"{self.address}/{name}: No such file")
        size = self.listed[name] if data is None else len(data)
        if data is None or size > limit.size:
            too_many = f"{size:,} bytes, more than the {limit.size:,} allowed for {limit.use}"
            raise BadSample("too many bytes", f"{self.address}/{name}: {too_many}")
        return data

    def ahead(self, names: Sequence[str]) -> None:
        """Ask for them all at once. What does not come is asked for again, and told of, when it is read."""
        with reported(self.address):
            system, _ = file_system(self.address)
            wanted = [name for name in names if self._may_come(name)]
            paths = {name: self._found(name)[1] for name in wanted}
            answers = system.cat(list(paths.values()), on_error="return") if paths else {}
        self.came = {name: data for name, path in paths.items() if isinstance(data := answers.get(path), bytes)}

    def _may_come(self, name: str) -> bool:
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
