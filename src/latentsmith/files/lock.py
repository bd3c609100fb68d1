"""Locks of folders and files that commands fill: one process at a time, and the system drops a dead process's lock.

The lock is `flock(2)` on a file that also says who holds it. Linux passes it on to the server of an NFS mount, so it
works between hosts there. Windows has no flock: nothing is locked.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from .errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
BUSY = (errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held: set[int] = set()  # descriptors of this process's locks


@contextmanager
def locked_folder(
    folder: Path, *, name: str = LOCK_FILE, subject: Path | None = None, shared: bool = False
) -> Iterator[None]:
    """Make a folder if it is missing, and lock it inside the context; one that was made and stayed empty is removed.

    name: of the lock's file in the folder. subject: what is locked, if it is not the folder. shared, raises: as
    `locked`.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: the folder cannot be made ({error.strerror}); name another") from None
    try:
        with locked(folder / name, subject or folder, shared=shared):
            yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for path in missing:
                path.rmdir()


@contextmanager
def locked(path: Path, subject: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock `path`, a file of no other use, inside the context; it is made, and removed at the end.

    subject: what is locked, for messages. shared: others may hold a shared lock as well.
    Raises BadInput that names the holder if another process holds the lock, and one where none can be made.
    """
    try:
        descriptor = _acquire(path, shared)
    except OSError as error:
        raise BadInput(f"{subject}: cannot be written ({error.strerror}); name another place") from None
    if descriptor is None:
        raise BadInput(f"{subject}: {_holder(path)} is writing here; wait until it ends, or stop it")
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            if not shared or _is_last(descriptor):
                path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def remove_stale_locks(folder: Path, pattern: str) -> None:
    """Delete the lock files in a folder that no process holds."""
    for path in folder.glob(pattern):
        with suppress(BadInput), locked(path, folder):
            pass


def _acquire(path: Path, shared: bool) -> int | None:
    """Return the descriptor of a locked file, None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _flock(descriptor, shared):
                os.close(descriptor)
                return None
            if _names(path, descriptor):
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the two calls: another file stands there now


def _flock(descriptor: int, shared: bool) -> bool:
    """Return whether the descriptor got the lock; where the file system has none, say so and go on."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            print("this file system has no locks: do not start the same command twice", file=sys.stderr, flush=True)
            return True
        if error.errno in BUSY:
            return False
        raise
    return True


def _is_last(descriptor: int) -> bool:
    """Return whether a shared lock has no other holder, which it then keeps to itself."""
    return _flock(descriptor, shared=False)


def _names(path: Path, descriptor: int) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "command": shlex.join(sys.argv)}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(record).encode())


def _holder(path: Path) -> str:
    """Return who holds a lock, as far as its file says it."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return f"process {record['pid']} on {record['host']}, started {record['started']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _close_in_child() -> None:
    """Let go of the parent's locks in a forked process, which would hold them for as long as it lives."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
