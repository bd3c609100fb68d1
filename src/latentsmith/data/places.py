"""Where the files of a source lie: a folder here, or any address that fsspec opens. Names are posix paths below it."""

import os
import posixpath
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from latentsmith.data.errors import BadSample
from latentsmith.data.remote import attempted, file_system, reported

AHEAD = 64  # files that are asked for at once from afar
PATTERN = frozenset("*?[")  # what fsspec takes for a pattern in a list of names


class Place(Protocol):
    """Files by name. `address` of all of them is what errors say."""

    address: str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file at any depth, without hidden ones and what macOS puts beside files in archives."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> BinaryIO: ...

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises BadSample if there is none, or it cannot be read."""

    def ahead(self, names: Sequence[str]) -> None:
        """These will be read next."""


class Here:
    """A folder of this machine."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder)

    def sizes(self) -> dict[str, int]:
        found = {}
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not hidden(name)]
            for path in (Path(parent, name) for name in names if not hidden(name)):
                found[path.relative_to(self.folder).as_posix()] = 0  # of a link to nothing
                with suppress(OSError):
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str) -> BinaryIO:
        return open(self.folder / name, "rb")

    def read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = "missing image" if not os.path.lexists(path) else "unreadable file"
            raise BadSample(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from None

    def ahead(self, names: Sequence[str]) -> None:
        pass


class Far:
    """A folder at an address that fsspec opens. A file that is not there is a BadSample; what the network or the
    server refuses, after some tries, is BadInput: it says nothing of the sample."""

    def __init__(self, url: str):
        self.address = url.rstrip("/") if not url.endswith("://") else url
        self.came: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        with reported(self.address):
            system, root = file_system(self.address)
            found = attempted(lambda: system.find(root, detail=True))
        below = {path.removeprefix(root).lstrip("/"): about.get("size") or 0 for path, about in found.items()}
        return {name: size for name, size in below.items() if not any(map(hidden, PurePosixPath(name).parts))}

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

    def read(self, name: str) -> bytes:
        if name in self.came:
            return self.came.pop(name)
        with reported(f"{self.address}/{name}"):
            system, path = self._found(name)
            with suppress(FileNotFoundError, IsADirectoryError):
                return attempted(lambda: system.cat_file(path))
        raise BadSample("missing image", f"{self.address}/{name}: No such file")

    def ahead(self, names: Sequence[str]) -> None:
        """Ask for them all at once. What does not come is asked for again, and told of, when it is read."""
        with reported(self.address):
            system, _ = file_system(self.address)
            paths = {name: self._found(name)[1] for name in names if not PATTERN.intersection(name)}
            answers = system.cat(list(paths.values()), on_error="return") if paths else {}
        self.came = {name: data for name, path in paths.items() if isinstance(data := answers.get(path), bytes)}

    def _found(self, name: str) -> tuple[Any, str]:
        """The file system, and a file's path in it."""
        system, root = file_system(self.address)  # asked for each time: after a fork it is another
        path = f"{root}/{name}"
        return system, resolved(path) if {".", ".."} & set(name.split("/")) else path


def resolved(path: str) -> str:
    """A path without `.` and `..`, behind its protocol if it has one."""
    protocol, mark, rest = path.rpartition("://")
    return protocol + mark + posixpath.normpath(rest)


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
