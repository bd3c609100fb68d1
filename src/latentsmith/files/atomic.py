"""Write files and folders so that a name is only ever seen with all of its content."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

INCOMPLETE = ".INCOMPLETE"
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that takes its name only once it is complete and on the disk.

    mode: "wb", or "w" for text in UTF-8. The parent folder is made where it is missing.
    The bytes go to a hidden `*.INCOMPLETE` file of its own in the same folder, so two writers of one name never mix;
    an error removes it and leaves what stood at `path` before untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{INCOMPLETE}")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            error.filename = str(path)  # a write does not say which file had no room
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder under a hidden name; it takes its own, which nothing may have but an empty folder, at the end.

    Yields the hidden folder. An error removes it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{INCOMPLETE}")
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_folder(aside)
        aside.replace(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at `path` by `data`, whole or not at all."""
    with atomic_open(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's own entries (a rename in it) to the disk, where the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(descriptor)


def remove_incomplete(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Delete what a killed writer left in `folder`: of the file or folder `name`, or of all.

    Only for a name, or a folder, that no one else is writing to.
    """
    for leftover in Path(folder).glob(f".*{INCOMPLETE}" if name is None else f".{escape(name)}.????????{INCOMPLETE}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
