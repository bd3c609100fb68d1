"""Sets that lie where fsspec reaches: `s3://`, `gs://`, `https://`, `memory://` and the like.

A folder in the local cache stands for the remote one: its small files are there, with `remote.json`, which says where
the tars are. A set that fits into the cache has its tars fetched whole, each when it is first touched; of a larger one
samples are read as ranges of bytes. Tars touched least recently give way to new ones.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from latentsmith.files.atomic import write_bytes, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text

REMOTE_FILE = "remote.json"
SMALL_FILES = ("set.json", "cache.json", "empty_prompt.npy", "buckets.npy")
TRIES = 4  # of one request; the waits between them double from half a second
GIB = 2**30


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and "://" in path


@dataclass(frozen=True)
class LocalCopies:
    """Where copies of remote files lie, and how many bytes of tars at most."""

    folder: Path
    limit: int = 50 * GIB

    @classmethod
    def default(cls) -> "LocalCopies":
        """The folder of $LATENTSMITH_DATA_CACHE, or `latentsmith/data` in the user's cache."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(os.environ.get("LATENTSMITH_DATA_CACHE") or cache / "latentsmith" / "data"))

    def stand_in(self, url: str) -> Path:
        """A local folder for the remote folder `url`, or for some tars in it named by a pattern; BadInput if there is
        nothing. Its name is that of the content: a set that has changed since gets another folder."""
        head, _, last = url.rstrip("/").rpartition("/")
        parent = head if "*" in last or last.endswith(".tar") else url.rstrip("/")
        small: dict[str, bytes] = {}
        with reported(url):
            if parent == head:
                found = _tars(url)
            elif listed := _read(f"{parent}/set.json"):
                found = {shard["file"]: (shard["bytes"], "") for shard in json.loads(listed)["shards"]}
                small = {name: data for name in SMALL_FILES if (data := _read(f"{parent}/{name}")) is not None}
            elif _read(f"{parent}/unfinished.json") is not None:
                raise BadInput(f"{url}: unfinished; run the command that filled it again, then copy it")
            else:
                found = _tars(f"{parent}/*.tar")
        if not found:
            raise BadInput(f"{url}: no set.json and no .tar shards here")
        if outside := [name for name in found if PurePosixPath(name).name != name]:
            raise BadInput(f"{url}: set.json names {outside[0]!r}, which is not a file beside it")
        sizes = {name: size for name, (size, _) in found.items()}
        content = json.dumps([parent, found, self.limit]) + small.get("set.json", b"").decode()
        folder = self.folder / fingerprint_text(content)[:24]
        if not (folder / REMOTE_FILE).exists():
            for name, data in small.items():
                write_bytes(folder / name, data)
            whole = sum(sizes.values()) <= self.limit
            about = {"url": parent, "sizes": sizes, "whole": whole, "limit": self.limit}
            write_text(folder / REMOTE_FILE, json.dumps(about) + "\n")
        return folder


def tars_of(folder: Path) -> list[Path]:
    """The tars that a stand-in stands for, there or not, in the order of their names."""
    about = read_about(folder)
    return [folder / name for name in sorted(about["sizes"])] if about else []


def read_about(folder: Path) -> dict[str, Any] | None:
    """What remote.json of a stand-in says; None for any other folder."""
    try:
        return json.loads((folder / REMOTE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None


def fetched(path: Path) -> "Ranges | None":
    """Have a tar of a stand-in here, whole; or, of a set that is too large for that, its bytes to be read in parts.

    None where the file lies at `path`, or is none of a stand-in. BadInput if it cannot be read.
    """
    about = read_about(path.parent)
    if about is None:
        return None
    url, index = f"{about['url']}/{path.name}", path.with_suffix(".index.npy")
    with reported(url):
        if not index.exists() and (data := _read(f"{about['url']}/{index.name}")) is not None:
            write_bytes(index, data)
        if not about["whole"]:
            return Ranges(url, about["sizes"][path.name])
        if path.exists():
            os.utime(path)
            return None
        make_room(path.parent.parent, about["limit"] - about["sizes"][path.name])
        aside = path.with_name(f"{path.name}.{os.getpid()}.fetching")
        try:
            attempted(lambda: file_system(url)[0].get_file(file_system(url)[1], str(aside)))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return None


def make_room(folder: Path, limit: int) -> None:
    """Delete the tars in the local cache that were touched least recently, until at most `limit` bytes are left."""
    found = []
    for path in folder.glob("*/*.tar"):
        with suppress(FileNotFoundError):  # another process makes room too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    held = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if held <= limit:
            return
        path.unlink(missing_ok=True)  # a process that has it mapped keeps its bytes
        held -= size


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
