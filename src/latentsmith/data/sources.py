"""Read images and captions from folders, tables and tars. A source lists items in a fixed order, undecoded.

There are two errors. BadInput: the source itself is wrong (no images, a garbled line of a table, a damaged tar).
BadSample, raised when an item is read: this one sample is wrong.
"""

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.images import HEAD, is_image
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
from .tar_index import index_path, refuse_packed

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as HF's imagefolder has them
TABLE_EXTENSIONS = ("jsonl", "csv", "parquet")
TEXT_EXTENSIONS = ("json", "md", "yaml", "yml", "html", "py", "tar", "npy", "npz", *TABLE_EXTENSIONS)  # never sniffed
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.\d]|$)", re.IGNORECASE)
SHOWN = 3  # names in a note
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
    """A listing of items in a fixed order. notes: what a user should know of it, such as files that were not read."""

    notes: list[str]

    def __len__(self) -> int: ...

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """Return the items from number `start` on."""

    def fingerprint(self) -> str:
        """Name the listing: another order, number or size of items gives another fingerprint."""


def open_source(path: str | os.PathLike[str], access: Access = INSIDE, captions: bool = True) -> Source:
    """Return the source at `path`, here or at an address that fsspec opens.

    It may be a folder (with `metadata.jsonl`, `.csv` or `.parquet`, or captions beside the images, or tars), a .jsonl
    or .csv file, a .parquet, a folder or pattern of them, a tar, a pattern of tars, or, here, NeMo's wdinfo.pkl beside
    them. Raises BadInput if it is none of these or has nothing in it.

    access: which files out of the source's folder may be read; the others are samples that raise BadSample.
    captions: whether they are needed.
    """
    path = _without_file_protocol(path)
    name, suffix = str(path), PurePosixPath(path).suffix.lower()
    folder, last = os.path.split(path)
    is_pattern = bool(set("*{").intersection(last))
    if suffix == ".parquet" and is_pattern:
        return _parquet_pattern(storage_at(folder, access), last)
    if suffix == ".tar" or (is_remote(path) and is_pattern):
        if not is_remote(path):
            _check_pattern(name, access)
        return TarSource(path)
    if suffix[1:] in TABLE_EXTENSIONS and not _is_folder(path):
        storage = storage_at(folder, access, named=last)
        if not storage.exists(last):
            raise BadInput(f"{path}: no such folder or file")
        return TableSource(storage, _table(storage, last), captions)
    if is_remote(path) or Path(path).is_dir():
        return folder_source(path, access, captions)
    if not Path(path).exists():
        raise BadInput(f"{path}: no such folder or file")
    if suffix == ".pkl":
        open_regular(path, JSON).close()
        beside, tars = Path(path).parent, read_wdinfo(Path(path))
        _check_tars(LocalStorage(beside, access), tars)
        return TarSource([beside / tar for tar in tars])
    refuse_packed(folder, [last])
    raise BadInput(
        f"{path}: not a source; it takes a folder of images, a .jsonl or .csv table, or WebDataset .tar files"
    )


def _table(storage: Storage, name: str) -> Table:
    return ParquetTable(storage, [name]) if _extension(name) == "parquet" else TextTable(storage, name)


def _parquet_pattern(storage: Storage, pattern: str) -> Source:
    """Return the source of the parquet files in one folder whose names fit a pattern."""
    patterns = expand_braces(pattern)
    names = sorted(name for name in storage.sizes() if any(fnmatchcase(name, each) for each in patterns))
    if not names:
        raise BadInput(f"{storage.address}/{pattern}: no such files")
    return TableSource(storage, ParquetTable(storage, names))


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


def folder_source(path: str | os.PathLike[str], access: Access = INSIDE, captions: bool = True) -> Source:
    """Return the source that a folder is, by the files in it."""
    storage = storage_at(path, access)
    if storage.exists(SET_FILE) or storage.exists(UNFINISHED_FILE):
        if isinstance(storage, LocalStorage) and storage.exists(SET_FILE):
            open_regular(storage.resolve(SET_FILE), JSON, storage.folder / SET_FILE).close()
            _check_tars(storage, [record.file for record in read_set_file(storage.folder)])
        return TarSource(path)
    sizes = storage.sizes()
    refused = {name: link_refused(f"{storage.address}/{name}") for name in storage.refused}
    images = [name for name in sorted(sizes, key=PurePosixPath) if _is_image(storage, name)]
    if table := _table_of(storage, sizes):
        source = TableSource(storage, _table(storage, table), captions, images)
        return _with_refused(source, source.unlisted() | refused)
    if images:
        found = FolderSource(storage, sizes, images)
        if captions and not found.captions:
            _check_captions(storage, sizes, images)
        return _with_refused(found, refused)
    top = [name for name in sizes if "/" not in name]
    refuse_packed(storage.address, top)
    # img2dataset leaves a .parquet beside each of its tars
    if tars := [name for name in top if _extension(name) == "tar"]:
        if isinstance(storage, LocalStorage):
            _check_tars(storage, tars)
        return TarSource(path)
    if parquets := [name for name in sorted(sizes, key=PurePosixPath) if _extension(name) == "parquet"]:
        _check_splits(storage, parquets)
        return _with_refused(TableSource(storage, ParquetTable(storage, parquets), captions), refused)
    if refused:
        raise next(iter(refused.values()))
    raise BadInput(f"{storage.address}: no images here; known extensions: {', '.join(IMAGE_EXTENSIONS[:12])}")


def _is_image(storage: Storage, name: str) -> bool:
    """Return whether a file is an image by its extension, or, here, by its first bytes."""
    extension = _extension(name)
    if extension in IMAGE_EXTENSIONS or extension in CAPTION_EXTENSIONS or extension in TEXT_EXTENSIONS:
        return extension in IMAGE_EXTENSIONS
    return is_image(storage.head(name, HEAD))


def _table_of(storage: Storage, names: Iterable[str]) -> str | None:
    """Return the folder's metadata table. Raises BadInput if it has two, or its subfolders have them."""
    tables = sorted((name for name in names if PurePosixPath(name).name.lower() in TABLES), key=PurePosixPath)
    top = [name for name in tables if "/" not in name]
    if len(top) > 1:
        raise BadInput(f"{storage.address}: has two tables, {top[0]} and {top[1]}; name the one to read")
    if tables and not top:
        folders = " and ".join(str(PurePosixPath(name).parent) for name in tables[:SHOWN])
        raise BadInput(f"{storage.address}: its tables are in {folders}; import each of these folders by itself")
    return top[0] if top else None


def _check_captions(storage: Storage, names: Iterable[str], images: Sequence[str]) -> None:
    """Raise BadInput for images without one caption file where something else may hold their captions."""
    others = sorted(name for name in names if _extension(name) in (*TABLE_EXTENSIONS, "tar", "json"))
    if others:
        what = f"{len(images):,} images without caption files, but {others[0]} is there"
        raise BadInput(
            f"{storage.address}: {what}; name it as the source, or as metadata{PurePosixPath(others[0]).suffix}"
        )


def _check_splits(storage: Storage, parquets: Sequence[str]) -> None:
    """Raise BadInput for the parquet files of several splits: a training set must not hold the test set."""
    splits: dict[str, str] = {}
    for name in parquets:
        parts = PurePosixPath(name).parts
        if found := next((match for part in parts if (match := SPLIT.match(part))), None):
            below = str(PurePosixPath(*parts[:-1])) + "/" if len(parts) > 1 else ""
            is_folder = found.string != parts[-1]
            splits.setdefault(found[1].lower(), f"{below}{'' if is_folder else found[1]}*.parquet")
    if len(splits) > 1:
        one = splits.get("train") or next(iter(splits.values()))
        raise BadInput(f"{storage.address}: has the splits {', '.join(splits)}; import one: '{storage.address}/{one}'")


def _with_refused(source: Source, causes: Mapping[str, BadSample]) -> Source:
    return RefusedFiles(source, causes) if causes else source


class RefusedFiles:
    """A source, and after its items one for each file or linked folder that it leaves out: reading it raises."""

    def __init__(self, source: Source, causes: Mapping[str, BadSample]):
        self.source, self.causes, self.names, self.notes = source, causes, tuple(causes), source.notes

    def __len__(self) -> int:
        return len(self.source) + len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        yield from self.source.items(start)
        for name in self.names[max(0, start - len(self.source)) :]:
            yield SourceItem(name, partial(self._refuse, name), lambda: "")

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join([self.source.fingerprint(), *self.names]))

    def _refuse(self, name: str) -> bytes:
        raise self.causes[name]


class FolderSource:
    """Images anywhere below a folder, by name, each with its caption in `NAME.txt` or `NAME.caption` beside it.

    NAME is the image's, with or without its extension.
    """

    def __init__(self, storage: Storage, sizes: Mapping[str, int], images: Sequence[str]):
        self.storage = storage
        captions = sorted((name for name in sizes if _extension(name) in CAPTION_EXTENSIONS), key=PurePosixPath)
        # of two captions the .txt
        by_stem = {_stem(name): name for name in sorted(captions, key=_extension)}
        stems = {image: next((stem for stem in (_stem(image), image) if stem in by_stem), "") for image in images}
        self.captions = {image: by_stem[stem] for image, stem in stems.items() if stem}
        self.images, used = set(images), {_stem(name) for name in self.captions.values()}
        self.names = [*images, *(name for name in captions if _stem(name) not in used)]
        self.notes = self._notes(sizes, captions)

    def _notes(self, names: Iterable[str], captions: Sequence[str]) -> list[str]:
        others = sorted(set(names).difference(self.images, captions))
        counts = Counter(self.captions.values())
        shared = [name for name, count in counts.items() if count > 1]
        notes = [f"files that were not read: {len(others):,} ({_some(others)})"] if others else []
        return notes + ([f"captions that go with several images: {len(shared):,} ({_some(shared)})"] if shared else [])

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for at in range(start, len(self), PREFETCH):
            names = self.names[at : at + PREFETCH]
            captions = [self.captions[name] for name in names if name in self.captions]
            self.storage.prefetch(list(dict.fromkeys([*names, *captions])))
            for name in names:
                if name not in self.images:
                    yield SourceItem(name, _no_image_for(name), lambda: "")
                else:
                    yield SourceItem(name, partial(self.storage.read, name), partial(self._caption, name))

    def _caption(self, image: str) -> str:
        name = self.captions.get(image)
        if name is None:
            stem, image = (PurePosixPath(one).name for one in (_stem(image), image))
            raise BadSample("missing caption", f"no {stem}.txt or {stem}.caption beside {image}")
        try:
            return _caption_text(self.storage.read(name, CAPTION), name)
        except BadSample as error:
            reason = "missing caption" if error.reason in ("missing image", "unreadable file") else error.reason
            raise BadSample(reason, str(error)) from None

    def fingerprint(self) -> str:
        used = [*self.names, *self.captions.values()]
        return fingerprint_text("\n".join(f"{name} {self.storage.states.get(name, '')}" for name in used))


class TableSource:
    """A table with a column for the image (a path beside the table, or bytes) and one for the caption; others are kept.

    captions: whether the second is needed. images: those in the table's folder, where it is the folder's own.
    Raises BadInput for a table without these columns.
    """

    def __init__(self, storage: Storage, table: Table, captions: bool = True, images: Sequence[str] = ()):
        self.storage, self.table, self.images = storage, table, images
        if not any(name in IMAGE_COLUMNS for name in table.columns) and URL_COLUMNS & set(table.columns):
            raise BadInput(f"{table.address}: holds addresses of images, not images; fetch them with img2dataset")
        self.image_column = self._column(IMAGE_COLUMNS, "the image (bytes or a path)")
        self.caption_column = self._column(CAPTION_COLUMNS, "the caption") if captions else None
        self.notes: list[str] = []

    def unlisted(self) -> dict[str, BadSample]:
        """Return the images of the folder that no row names, each with its cause; note rows that name one again."""
        listed = Counter(_plain_name(row.get(self.image_column)) for _, row in self.table.rows()) if self.images else {}
        again = [name for name in self.images if listed.get(name, 0) > 1]
        if again:
            self.notes.append(f"images that several rows name: {len(again):,} ({_some(again)})")
        missing = [name for name in self.images if name not in listed]
        return {
            name: BadSample("not in the table", f"{name}: {self.table.address} has no row for it") for name in missing
        }

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
                caption = partial(_cell_text, row.get(self.caption_column or ""), where)
                yield SourceItem(name, partial(image_bytes, image, self.storage, where), caption, extra)

    def fingerprint(self) -> str:
        states = [f"{name} {self.storage.states.get(name, '')}" for name in self.images]
        return fingerprint_text("\n".join([self.table.fingerprint(), *states])) if states else self.table.fingerprint()

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
        self.notes: list[str] = []

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


def _plain_name(image: Any) -> str:
    """Return the name of a file in a cell of a table as the folder's listing has it."""
    image = image.get("path") if isinstance(image, Mapping) else image
    return posixpath.normpath(image.replace("\\", "/")) if isinstance(image, str) else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


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
