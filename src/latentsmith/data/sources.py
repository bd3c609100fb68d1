"""Read images and captions from folders, tables and tars. A source lists items in a fixed order, undecoded.

There are two errors. BadInput: the source itself is wrong (no images, a garbled line of a table, a damaged tar).
BadSample, raised when an item is read: this one sample is wrong.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.pickles import load_plain
from latentsmith.files.regular import CAPTION, JSON, check_regular, open_regular
from latentsmith.files.text import NotText, checked_text, decode_text

from .errors import BadSample
from .sample_io import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, image_member
from .shards import SET_FILE, UNFINISHED_FILE, Sample, ShardSet, expand_braces, read_set_file
from .storage import (
    INSIDE,
    PREFETCH,
    Access,
    LocalStorage,
    RemoteStorage,
    Storage,
    is_remote,
    link_refused,
    storage_at,
)
from .tables import ParquetTable, Table, TextTable, image_bytes
from .tar_index import index_path

TABLES = ("metadata.jsonl", "metadata.csv")  # as HF's imagefolder has them
IMAGE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file", "image_bytes", "jpg", "png", "bytes")
URL_COLUMNS = {"url", "image_url", "URL"}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
NOT_TEXT = "caption not UTF-8"


@dataclass(frozen=True)
class SourceItem:
    """One image and its caption, unread. `image()` and `caption()` raise BadSample; a caption may be empty."""

    name: str
    image: Callable[[], bytes]
    caption: Callable[[], str]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A listing of items in a fixed order."""

    def __len__(self) -> int: ...

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """Return the items from number `start` on."""

    def fingerprint(self) -> str:
        """Name the listing: another order, number or size of items gives another fingerprint."""


def open_source(path: str | os.PathLike[str], access: Access = INSIDE) -> Source:
    """Return the source at `path`, here or at an address that fsspec opens.

    It may be a folder (with `metadata.jsonl` or `.csv`, or captions beside the images, or tars), a .jsonl or .csv file,
    a .parquet or a folder of them, a tar, a pattern of tars, or, here, NeMo's wdinfo.pkl beside them. Raises BadInput
    if it is none of these or has nothing in it.

    access: which files out of the source's folder may be read; the others are samples that raise BadSample.
    """
    path = _without_file_protocol(path)
    name, suffix = str(path), PurePosixPath(path).suffix.lower()
    if suffix == ".tar" or (is_remote(path) and set("*{").intersection(name.rpartition("/")[2])):
        if not is_remote(path):
            _check_pattern(name, access)
        return TarSource(path)
    if suffix in (".jsonl", ".csv", ".parquet") and not _is_folder(path):
        folder, name = os.path.split(path)
        storage = storage_at(folder, access, named=name)
        if not storage.exists(name):
            raise BadInput(f"{path}: no such folder or file")
        table = ParquetTable(storage, [name]) if suffix == ".parquet" else TextTable(storage, name)
        return TableSource(storage, table)
    if is_remote(path) or Path(path).is_dir():
        return folder_source(path, access)
    if not Path(path).exists():
        raise BadInput(f"{path}: no such folder or file")
    if suffix == ".pkl":
        open_regular(path, JSON).close()
        beside, tars = Path(path).parent, read_wdinfo(Path(path))
        _check_tars(LocalStorage(beside, access), tars)
        return TarSource([beside / tar for tar in tars])
    raise BadInput(
        f"{path}: not a source; it takes a folder of images, a .jsonl or .csv table, or WebDataset .tar files"
    )


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return RemoteStorage(str(path)).is_folder() if is_remote(path) else Path(path).is_dir()


def _without_file_protocol(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path of a `file://` address: fsspec would follow its links and wait for its FIFOs."""
    for protocol in ("file://", "local://"):
        if isinstance(path, str) and path.startswith(protocol):
            return path.removeprefix(protocol)
    return path


def _check_tars(storage: LocalStorage, names: Iterable[str]) -> None:
    """Raise BadInput for a tar, or an index beside one, that may not be read or is no regular file."""
    for tar in names:
        for name in (tar, str(index_path(Path(tar)))):
            with suppress(FileNotFoundError):  # ShardSet reports a tar that is missing
                check_regular(storage.resolve(name), storage.folder / name)


def _check_pattern(pattern: str, access: Access) -> None:
    """Call `_check_tars` for a tar that the user named, or those that a pattern names."""
    for path in map(Path, expand_braces(pattern)):
        if "*" not in path.name:
            _check_tars(LocalStorage(path.parent, access, named=path.name), [path.name])
        else:
            _check_tars(LocalStorage(path.parent, access), [tar.name for tar in path.parent.glob(path.name)])


def folder_source(path: str | os.PathLike[str], access: Access = INSIDE) -> Source:
    """Return the source that a folder is, by the files in it."""
    storage = storage_at(path, access)
    if storage.exists(SET_FILE) or storage.exists(UNFINISHED_FILE):
        if isinstance(storage, LocalStorage) and storage.exists(SET_FILE):
            open_regular(storage.resolve(SET_FILE), JSON, storage.folder / SET_FILE).close()
            _check_tars(storage, [record.file for record in read_set_file(storage.folder)])
        return TarSource(path)
    if tables := [name for name in TABLES if storage.exists(name)]:
        return TableSource(storage, TextTable(storage, tables[0]))
    sizes = storage.sizes()
    if any(_extension(name) in IMAGE_EXTENSIONS for name in sizes):
        return _with_refused(FolderSource(storage, sizes), storage)
    # img2dataset leaves a .parquet beside each of its tars
    if tars := [name for name in sizes if "/" not in name and _extension(name) == "tar"]:
        if isinstance(storage, LocalStorage):
            _check_tars(storage, tars)
        return TarSource(path)
    if parquets := [name for name in sorted(sizes, key=PurePosixPath) if _extension(name) == "parquet"]:
        return _with_refused(TableSource(storage, ParquetTable(storage, parquets)), storage)
    if storage.refused:
        raise link_refused(f"{storage.address}/{storage.refused[0]}")
    raise BadInput(f"{storage.address}: no images here; known extensions: {', '.join(IMAGE_EXTENSIONS)}")


def _with_refused(source: Source, storage: Storage) -> Source:
    return RefusedLinks(source, storage) if storage.refused else source


class RefusedLinks:
    """A source, and after its items one for each linked folder that was left out: reading it raises BadSample."""

    def __init__(self, source: Source, storage: Storage):
        self.source, self.storage, self.names = source, storage, tuple(storage.refused)

    def __len__(self) -> int:
        return len(self.source) + len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        yield from self.source.items(start)
        for name in self.names[max(0, start - len(self.source)) :]:
            yield SourceItem(name, partial(self._refuse, name), lambda: "")

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join([self.source.fingerprint(), *self.names]))

    def _refuse(self, name: str) -> bytes:
        raise link_refused(f"{self.storage.address}/{name}")


class FolderSource:
    """Images anywhere below a folder, by name, each with its caption in `NAME.txt` or `NAME.caption` beside it."""

    def __init__(self, storage: Storage, sizes: Mapping[str, int]):
        self.storage, self.sizes = storage, sizes
        names = sorted(sizes, key=PurePosixPath)
        images = [name for name in names if _extension(name) in IMAGE_EXTENSIONS]
        captioned = {_stem(name) for name in images}
        captions = [name for name in names if _extension(name) in CAPTION_EXTENSIONS]
        # of two captions the .txt
        self.captions = {_stem(name): name for name in sorted(captions, key=_extension)}
        self.names = images + [name for name in captions if _stem(name) not in captioned]

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for at in range(start, len(self), PREFETCH):
            names = self.names[at : at + PREFETCH]
            captions = [self.captions[stem] for stem in map(_stem, names) if stem in self.captions]
            self.storage.prefetch(list(dict.fromkeys([*names, *captions])))
            for name in names:
                if _extension(name) in CAPTION_EXTENSIONS:
                    yield SourceItem(name, _no_image_for(name), lambda: "")
                else:
                    yield SourceItem(name, partial(self.storage.read, name), partial(self._caption, name))

    def _caption(self, image: str) -> str:
        name = self.captions.get(_stem(image))
        if name is None:
            stem, image = (PurePosixPath(one).name for one in (_stem(image), image))
            raise BadSample("missing caption", f"no {stem}.txt or {stem}.caption beside {image}")
        try:
            return _caption_text(self.storage.read(name, CAPTION), name)
        except BadSample as error:
            reason = "missing caption" if error.reason in ("missing image", "unreadable file") else error.reason
            raise BadSample(reason, str(error)) from None

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join(f"{name} {self.sizes[name]}" for name in self.names))


class TableSource:
    """A table with a column for the image (a path beside the table, or bytes) and one for the caption; others are kept.

    Raises BadInput for a table without these columns.
    """

    def __init__(self, storage: Storage, table: Table):
        self.storage, self.table = storage, table
        if not any(name in IMAGE_COLUMNS for name in table.columns) and URL_COLUMNS & set(table.columns):
            raise BadInput(f"{table.address}: holds addresses of images, not images; fetch them with img2dataset")
        self.image_column = self._column(IMAGE_COLUMNS, "the image (bytes or a path)")
        self.caption_column = self._column(CAPTION_COLUMNS, "the caption")

    def __len__(self) -> int:
        return len(self.table)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        rows = self.table.rows(start)
        while some := list(islice(rows, PREFETCH)):
            images = [row.get(self.image_column) for _, row in some]
            self.storage.prefetch([image for image in images if isinstance(image, str) and image])
            for (where, row), image in zip(some, images, strict=True):
                extra = {
                    key: value
                    for key, value in row.items()
                    if key not in (self.image_column, self.caption_column) and self.table.keeps(value)
                }
                name = image if isinstance(image, str) and image else where
                caption = partial(_cell_text, row.get(self.caption_column), where)
                yield SourceItem(name, partial(image_bytes, image, self.storage, where), caption, extra)

    def fingerprint(self) -> str:
        return self.table.fingerprint()

    def _column(self, names: Iterable[str], what: str) -> str:
        by_name = {column.lower(): column for column in self.table.columns}
        for name in names:
            if name in by_name:
                return by_name[name]
        columns = ", ".join(self.table.columns[:8]) or "(none)"
        raise BadInput(f"{self.table.address}: no column for {what} among {columns}; name it one of {', '.join(names)}")


class TarSource:
    """WebDataset tars: in each sample an image, and a caption as .txt, .caption or an entry of the .json."""

    def __init__(self, tars: str | os.PathLike[str] | list[Path]):
        self.shards = ShardSet(tars)
        if not len(self.shards):
            raise BadInput(f"{tars}: the tars hold no samples")

    def __len__(self) -> int:
        return len(self.shards)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for number in range(start, len(self)):
            yield _tar_item(self.shards[number])

    def fingerprint(self) -> str:
        return self.shards.fingerprint()


def _tar_item(sample: Sample) -> SourceItem:
    extra, fault = _json_member(sample)
    held = next((extension for extension in CAPTION_EXTENSIONS if extension in sample.members), None)
    if held:
        caption = partial(_caption_text, bytes(sample.members[held]), f"{sample.key}.{held}")
    else:
        value = next((extra[name] for name in CAPTION_COLUMNS if name in extra), None)
        caption = partial(_cell_text, value, sample.key, fault or "there is no caption")
    try:
        extension, data = image_member(sample)
    except BadSample as error:
        return SourceItem(sample.key, _raiser(error.reason, f"{sample.key}: {error}"), caption, extra)
    return SourceItem(f"{sample.key}.{extension}", partial(bytes, data), caption, extra)


def _json_member(sample: Sample) -> tuple[dict[str, Any], str]:
    """Return the sample's .json as an object, and why it is empty if it cannot be read."""
    try:
        content = json.loads(bytes(sample.members.get("json", b"{}")))
    except (ValueError, RecursionError) as error:
        return {}, f"there is no .txt, and the .json cannot be read ({error})"
    return (content, "") if isinstance(content, dict) else ({}, "there is no .txt, and the .json is no object")


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    """Return a name without its extension."""
    return str(PurePosixPath(name).with_suffix(""))


def _caption_text(data: bytes, name: str) -> str:
    """Return a caption from the bytes of its file. Raises BadSample if they are no text."""
    try:
        return decode_text(data, name)
    except NotText as error:
        raise BadSample(NOT_TEXT, str(error)) from None


def _cell_text(value: Any, where: str, absent: str = "there is no caption") -> str:
    """Return a caption from a cell of a table or an entry of JSON. Raises BadSample if it is no text."""
    if value is None:
        raise BadSample("missing caption", f"{where}: {absent}")
    if not isinstance(value, str):
        raise BadSample("missing caption", f"{where}: the caption is {type(value).__name__}, not a text")
    try:
        return checked_text(value, where)
    except NotText as error:
        raise BadSample(NOT_TEXT, str(error)) from None


def _no_image_for(caption: str) -> Callable[[], bytes]:
    return _raiser("missing image", f"{PurePosixPath(caption).name} is a caption without an image of the same name")


def _raiser(reason: str, detail: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise BadSample(reason, detail)

    return read


def read_wdinfo(path: Path) -> list[str]:
    """Return the tars that a `wdinfo.pkl` lists, as it names them. Raises BadInput for a file that is none."""
    try:
        info = load_plain(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    tars = info.get("tar_files") if isinstance(info, dict) else None
    if not isinstance(tars, list) or not tars or not all(isinstance(tar, str) for tar in tars):
        raise BadInput(f"{path}: not a wdinfo.pkl: it has no list tar_files of names")
    return tars
