"""Local mirrors of remote sets of shards: tars fetched whole when they are touched, or read in ranges of bytes."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any, BinaryIO

from latentsmith.files.atomic import write_bytes, write_text
from latentsmith.files.cache_folder import user_cache
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.json import parse_json, read_json

from .storage import RemoteStorage, errors_reported, file_system, with_retries

REMOTE_FILE = "remote.json"
SMALL_FILES = ("set.json", "cache.json", "empty_prompt.npy", "buckets.npy")
TAR_NAME = re.compile(r"[^/\\\0]+\.tar")  # a file beside remote.json, never a path
NAME_LENGTH = 24  # hex digits
GIB = 2**30


@dataclass(frozen=True)
class MirrorCache:
    """The local cache of remote sets: its folder, and how many bytes of tars it holds at most.

    Each remote set has a folder directly below `folder`: its small files, with `remote.json`, which says where the
    tars are. A set that fits into the cache has its tars fetched whole, each when it is first touched; of a larger one
    samples are read as ranges of bytes. Tars touched least recently give way to new ones. A `remote.json` anywhere
    else is data and is never obeyed.
    """

    folder: Path
    limit: int = 50 * GIB

    @classmethod
    def default(cls) -> "MirrorCache":
        """Return the cache in $LATENTSMITH_DATA_CACHE, or in the user's cache folder."""
        return cls(Path(os.environ.get("LATENTSMITH_DATA_CACHE") or user_cache("data")))

    def mirror(self, url: str) -> Path:
        """Make a local folder for the remote folder `url`, or for some tars in it named by a pattern.

        The folder's name is a fingerprint of the content: a set that has changed gets another folder. Raises BadInput
        if there is nothing at `url`.
        """
        head, _, last = url.rstrip("/").rpartition("/")
        is_folder = "*" not in last and not last.endswith(".tar")
        remote = RemoteStorage(url if is_folder else head)
        small: dict[str, bytes] = {}
        if not is_folder:
            tars = _tars_at(url)
        elif listed := remote.fetch("set.json"):
            with errors_reported(url):
                shards = parse_json(listed, f"{url}/set.json", "a listing of shards")["shards"]
                tars = {shard["file"]: (int(shard["bytes"]), "") for shard in shards}
            small = {name: data for name in SMALL_FILES if (data := remote.fetch(name)) is not None}
        elif remote.exists("unfinished.json"):
            raise BadInput(f"{url}: unfinished; run the command that filled it again, then copy it")
        else:
            tars = _tars_at(f"{remote.address}/*.tar")
        if outside := [name for name in tars if not TAR_NAME.fullmatch(name)]:
            raise BadInput(f"{url}: names {outside[0]!r}, which is not a .tar beside it")
        if not tars:
            raise BadInput(f"{url}: no set.json and no .tar shards here")
        folder = self.folder / _mirror_name(remote.address, tars, small.get("set.json", b""))
        if folder.is_symlink():
            raise BadInput(f"{folder}: a symbolic link in the cache of remote sets; delete it")
        if self.mirror_at(folder) is None:
            for name, data in small.items():
                write_bytes(folder / name, data)
            write_text(folder / REMOTE_FILE, json.dumps({"url": remote.address, "tars": tars}) + "\n")
        return folder

    def mirror_at(self, folder: Path) -> "Mirror | None":
        """Return the mirror that this cache made in `folder`; None for any other folder.

        Proof that it was made here: it lies directly below the cache folder, not through a symbolic link, and its name
        is the fingerprint of what its remote.json and set.json say.
        """
        try:
            if len(folder.name) != NAME_LENGTH or folder.resolve() != self.folder.resolve() / folder.name:
                return None
            info = read_json(folder / REMOTE_FILE, "the description of a mirror")
            url, tars = info["url"], {name: (size, state) for name, (size, state) in info["tars"].items()}
            listing = folder / "set.json"
            is_ours = folder.name == _mirror_name(url, tars, listing.read_bytes() if listing.exists() else b"")
            if not is_ours or not all(TAR_NAME.fullmatch(name) for name in tars):
                return None
            return Mirror(self, folder, url, {name: int(size) for name, (size, _) in tars.items()})
        except (
            BadInput,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
        ):  # last: looping links
            return None

    def make_room(self, size: int) -> None:
        """Delete the tars touched least recently until `size` more bytes fit within the limit.

        Only regular files that the remote.json of a mirror made here lists are counted and deleted.
        """
        found = []
        for mirror in filter(None, map(self.mirror_at, self.folder.iterdir())):
            for path in mirror.tars:
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

    cache: MirrorCache
    folder: Path
    url: str
    sizes: Mapping[str, int]

    @property
    def tars(self) -> list[Path]:
        """Return the paths of its tars, fetched or not, sorted by name."""
        return [self.folder / name for name in sorted(self.sizes)]

    def fetch(self, name: str) -> "RemoteFile | None":
        """Fetch a tar whole and return None; of a set larger than the cache's limit return its bytes, not fetched.

        Its index is fetched too. A name that the set does not list is left alone. Raises BadInput if it cannot be read.
        """
        if name not in self.sizes:
            return None
        remote, path = RemoteStorage(self.url), self.folder / name
        index = path.with_suffix(".index.npy")
        if not index.exists() and (data := remote.fetch(index.name)) is not None:
            write_bytes(index, data)
        if sum(self.sizes.values()) > self.cache.limit:
            return RemoteFile(remote, name, self.sizes[name])
        if path.exists():
            os.utime(path)
            return None
        self.cache.make_room(self.sizes[name])
        aside = path.with_name(f"{name}.{os.getpid()}.fetching")
        try:
            remote.request(name, lambda system, source: system.get_file(source, str(aside)))
            if not aside.exists():
                raise BadInput(f"{self.url}/{name}: no such file")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return None


class RemoteFile:
    """The bytes of a remote file, each slice a request. Raises BadInput as RemoteStorage does."""

    def __init__(self, storage: RemoteStorage, name: str, size: int):
        self.storage, self.name, self.size = storage, name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice) -> bytes:
        assert index.step is None
        start, stop, _ = index.indices(self.size)
        if start >= stop:
            return b""
        data = self.storage.fetch(self.name, start, stop)
        if data is None:
            raise BadInput(f"{self.storage.address}/{self.name}: no such file")
        return data

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the whole, to read and seek in."""
        with errors_reported(f"{self.storage.address}/{self.name}"), self.storage.open(self.name) as file:
            yield file


def _mirror_name(url: str, tars: Mapping[str, tuple[int, str]], listing: bytes) -> str:
    """Return the name of a mirror's folder. tars: (bytes, state) by name. listing: its set.json, or nothing."""
    return fingerprint_text(json.dumps([url, tars]) + listing.decode())[:NAME_LENGTH]


def _tars_at(pattern: str) -> dict[str, tuple[int, str]]:
    """Return bytes and state of the tars that a pattern or a name means; another state means another content."""
    with errors_reported(pattern):
        system, root = file_system(pattern)
        paths = sorted(with_retries(lambda: system.glob(root))) if "*" in root else [root]
        found = {}
        for path in paths:
            size, state = with_retries(partial(_size_and_state, system, path))
            found[PurePosixPath(path).name] = (int(size), str(state))
        return found


def _size_and_state(system: Any, path: str) -> tuple[int, str]:
    return system.size(path), system.ukey(path)
