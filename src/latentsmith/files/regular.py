"""Open and read regular files only, of bounded size.

A FIFO blocks until somebody writes to it, `/dev/zero` never ends, and files of `/proc` have bytes though their size is
0. All of these can be reached through a link in a folder that came from elsewhere.
"""

import errno
import io
import os
import stat
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from .errors import BadInput

Read = TypeVar("Read", int, bytes)  # what a read returns: how many bytes, or they themselves

MIB = 2**20
PIECE = 65_536  # bytes read at a time past a file's size


@dataclass(frozen=True)
class SizeLimit:
    """The most bytes that a file of some use may have."""

    use: str
    size: int


# The reason of each limit is beside it.
IMAGE = SizeLimit("an image", 512 * MIB)  # an uncompressed image of 89 million pixels (MAX_PIXELS), 16 bits a channel
CAPTION = SizeLimit("a caption", MIB)  # `data import` takes 10,000 characters, which are at most 40 kB
PROMPTS = SizeLimit("a file of prompts", 64 * MIB)  # a million prompts of 64 characters, held in memory
JSON = SizeLimit("a JSON file", 64 * MIB)  # held in memory, ten times as large once parsed
CONFIG = SizeLimit("a config", 16 * MIB)  # YAML is parsed at about 1 MB/s; real configs have a few kB
TABLE = SizeLimit("a table", 256 * 1024 * MIB)  # read row by row; 100 million rows of 2,700 bytes
TABLE_LINE = SizeLimit("a line of a table", 16 * MIB)  # held in memory; real ones have a few kB

NAMES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
}


class NotRegular(BadInput):
    """A path that names a FIFO, a device, a directory or a socket."""


class TooLarge(BadInput):
    """A file with more bytes than its use allows."""


Pathlike = str | os.PathLike[str]


def check_regular(path: Pathlike, name: Pathlike | None = None) -> os.stat_result:
    """Return the stat of a regular file, links followed. Raises NotRegular for any other, OSError if there is none.

    name: the file's name in errors, `path` by default.
    """
    return _checked(name or path, os.stat(path))


def open_regular(path: Pathlike, limit: SizeLimit | None = None, name: Pathlike | None = None) -> BinaryIO:
    """Open a regular file to read its bytes; never blocks.

    limit: the most bytes it may have; reading past them raises TooLarge too (a file that grows, or one of /proc).
    name: the file's name in errors, `path` by default. Raises NotRegular, TooLarge, or OSError as `open` does.
    """
    name = name or path
    check_regular(path, name)  # opening a device can have effects of its own (a tape is rewound)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        size = _checked(name, os.fstat(descriptor)).st_size  # between the two calls the path may have been replaced
        if limit is not None and size > limit.size:
            raise _too_large(name, size, limit)
        raw = io.FileIO(descriptor) if limit is None else _BoundedFile(descriptor, name, limit)
    except BaseException:
        os.close(descriptor)
        raise
    return io.BufferedReader(raw)


def read_regular(path: Pathlike, limit: SizeLimit, name: Pathlike | None = None) -> bytes:
    """Return the bytes of a regular file. Arguments and errors as `open_regular`."""
    with open_regular(path, limit, name) as file:
        return file.read()


def _checked(name: Pathlike, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        found = NAMES.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise NotRegular(f"{os.fspath(name)}: is {found}; a regular file was expected")
    return status


def _too_large(name: Pathlike, size: int, limit: SizeLimit) -> TooLarge:
    return TooLarge(f"{os.fspath(name)}: {size:,} bytes, more than the {limit.size:,} allowed for {limit.use}")


class _BoundedFile(io.FileIO):
    """A file whose bytes after the first `limit` cannot be read."""

    def __init__(self, descriptor: int, path: Pathlike, limit: SizeLimit):
        super().__init__(descriptor)
        self.path, self.limit = path, limit

    def readinto(self, buffer: Any, /) -> int:
        count: int | None = super().readinto(buffer)
        return self._counted(count)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self.readall()
        data: bytes | None = super().read(min(size, max(1, self.limit.size + 1 - self.tell())))
        return self._counted(data)

    def readall(self) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        pieces = [self.read(max(left, 0) + 1)]  # a file that does not grow comes whole, without a copy
        while pieces[-1]:
            pieces.append(self.read(PIECE))
        return b"".join(pieces[:-1])

    def _counted(self, done: Read | None) -> Read:
        """Return what was read, if it ends within the limit."""
        if done is None:  # O_NONBLOCK and a file of /proc that has nothing to read yet
            raise BlockingIOError(errno.EAGAIN, "has no bytes to read yet")
        if (end := self.tell()) > self.limit.size:
            raise _too_large(self.path, end, self.limit)
        return done
