"""Where pictures and captions come from: folders, tables, tars. A source lists items in a fixed order, undecoded.

Errors are of two kinds. BadInput: the source itself is wrong (no pictures, a garbled line of a table, a damaged tar).
BadSample, raised when an item is read: this one sample is wrong.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, hash_stream
from latentsmith.files.pickles import load_plain
from latentsmith.files.regular import CAPTION, JSON, TABLE_LINE, check_regular, open_regular

from .errors import BadSample
from .parquet import URL_COLUMNS, ParquetTable, image_of
from .sample_io import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from .shards import SET_FILE, UNFINISHED_FILE, Sample, ShardSet, expand_braces, read_set_file
from .storage import (
    INSIDE,
    PREFETCH,
    Access,
    LocalStorage,
    RemoteStorage,
    Storage,
    errors_reported,
    is_remote,
    link_refused,
    storage_at,
)
from .tar_index import index_path

TABLES = ("metadata.jsonl", "metadata.csv")  # as HF's imagefolder has them
IMAGE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
PICTURE_COLUMNS = (*IMAGE_COLUMNS, "image_bytes", "jpg", "png", "bytes")


@dataclass(frozen=True)
class SourceItem:
    """One picture and its caption, unread. `image()` and `caption()` raise BadSample; a caption may be empty."""

    name: str
    image: Callable[[], bytes]
    caption: Callable[[], str]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A listing of items in a fixed order."""

    def __len__(self) -> int: ...

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """The items from number `start` on."""

    def fingerprint(self) -> str:
        """Names the listing: another order, number or size of items gives another fingerprint."""


def open_source(path: str | os.PathLike, access: Access = INSIDE) -> Source:
    """The source at `path`, here or at an address that fsspec opens: a folder (with `metadata.jsonl` or `.csv`, or
    captions beside the images, or tars), a .jsonl or .csv file, a .parquet or a folder of them, a tar, a pattern of
    tars, or, here, NeMo's wdinfo.pkl beside them. BadInput if it is none of these or has nothing in it.

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
        return ParquetSource(storage, [name]) if suffix == ".parquet" else TableSource(storage, name)
    if is_remote(path) or Path(path).is_dir():
        return folder_source(path, access)
    if not Path(path).exists():
        raise BadInput(f"{path}: no such folder or file")
    if suffix == ".pkl":
        open_regular(path, JSON).close()
        folder, tars = Path(path).parent, read_wdinfo(Path(path))
        _check_tars(LocalStorage(folder, access), tars)
        return TarSource([folder / tar for tar in tars])
    raise BadInput(
        f"{path}: not a source; it takes a folder of images, a .jsonl or .csv table, or WebDataset .tar files"
    )


def _is_folder(path: str | os.PathLike) -> bool:
    return RemoteStorage(str(path)).is_folder() if is_remote(path) else Path(path).is_dir()


def _without_file_protocol(path: str | os.PathLike) -> str | os.PathLike:
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
    """`_check_tars` for a tar that the user named, or those that a pattern names."""
    for path in map(Path, expand_braces(pattern)):
        if "*" not in path.name:
            _check_tars(LocalStorage(path.parent, access, named=path.name), [path.name])
        else:
            _check_tars(LocalStorage(path.parent, access), [tar.name for tar in path.parent.glob(path.name)])


def folder_source(path: str | os.PathLike, access: Access = INSIDE) -> Source:
    """What a folder is a source of, by the files in it."""
    storage = storage_at(path, access)
    if storage.exists(SET_FILE) or storage.exists(UNFINISHED_FILE):
        if isinstance(storage, LocalStorage) and storage.exists(SET_FILE):
            open_regular(storage.resolve(SET_FILE), JSON, storage.folder / SET_FILE).close()
            _check_tars(storage, [record.file for record in read_set_file(storage.folder)])
        return TarSource(path)
    if tables := [name for name in TABLES if storage.exists(name)]:
        return TableSource(storage, tables[0])
    sizes = storage.sizes()
    if any(_extension(name) in IMAGE_EXTENSIONS for name in sizes):
        return _with_refused(FolderSource(storage, sizes), storage)
    # img2dataset leaves a .parquet beside each of its tars
    if tars := [name for name in sizes if "/" not in name and _extension(name) == "tar"]:
        if isinstance(storage, LocalStorage):
            _check_tars(storage, tars)
        return TarSource(path)
    if parquets := [name for name in sorted(sizes, key=PurePosixPath) if _extension(name) == "parquet"]:
        return _with_refused(ParquetSource(storage, parquets), storage)
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
            return self.storage.read(name, CAPTION).decode("utf-8-sig", "surrogateescape")
        except BadSample as error:
            reason = "missing caption" if error.reason in ("missing image", "unreadable file") else error.reason
            raise BadSample(reason, str(error)) from None

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join(f"{name} {self.sizes[name]}" for name in self.names))


class TableSource:
    """A .jsonl or .csv file: one row per sample, with a column for the image's path, relative to the table, and one for
    the caption; every other column is kept as JSON. BadInput, with the line's number, for a table that cannot be read.
    """

    def __init__(self, storage: Storage, name: str):
        self.storage, self.name = storage, name
        self.table = f"{storage.address}/{name}"
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            raise BadInput(f"{self.table}: an empty table; it needs rows with file_name and text")
        self.image_column = self._column(first[1], IMAGE_COLUMNS, "the image's path")
        self.caption_column = self._column(first[1], CAPTION_COLUMNS, "the caption")
        self._length = 1 + sum(1 for _ in rows)

    def __len__(self) -> int:
        return self._length

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        rows = islice(self._rows(), start, None)
        while some := list(islice(rows, PREFETCH)):
            names = [row.get(self.image_column) for _, row in some]
            self.storage.prefetch([name for name in names if isinstance(name, str) and name])
            for (line, row), name in zip(some, names, strict=True):
                caption = row.get(self.caption_column)
                extra = {key: v for key, v in row.items() if key not in (self.image_column, self.caption_column)}
                if isinstance(name, str) and name:
                    yield SourceItem(name, partial(self.storage.read, name), _text_reader(caption), extra)
                else:
                    where = f"line {line:,} of {self.name}"
                    yield SourceItem(where, _raiser("missing image", f"{where}: no {self.image_column}"), lambda: "")

    def fingerprint(self) -> str:
        with errors_reported(self.table), self.storage.open(self.name) as file:
            return hash_stream(file)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = _jsonl_rows if _extension(self.name) == "jsonl" else _csv_rows
        with errors_reported(self.table), self.storage.open(self.name) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            yield from rows(_lines(text, self.table), self.table)

    def _column(self, row: Mapping[str, Any], known: Iterable[str], what: str) -> str:
        for column in known:
            if column in row:
                return column
        names = ", ".join(map(str, list(row)[:8])) or "(none)"
        raise BadInput(f"{self.table}: no column for {what} among {names}; name it one of {', '.join(known)}")


class ParquetSource:
    """Parquet files: a column with the image (bytes, a path beside the table, or both as Hugging Face has them), one
    with the caption; other columns that JSON can hold are kept."""

    def __init__(self, storage: Storage, names: Sequence[str]):
        self.storage, self.table = storage, ParquetTable(storage, names)
        if not len(self.table):
            raise BadInput(f"{self.table.address}: the table has no rows")
        self.image_column = self._column(PICTURE_COLUMNS, "the image (bytes or a path)")
        self.caption_column = self._column(CAPTION_COLUMNS, "the caption")

    def __len__(self) -> int:
        return len(self.table)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for where, row in self.table.rows(start):
            extra = {
                key: value
                for key, value in row.items()
                if key not in (self.image_column, self.caption_column) and isinstance(value, str | int | float | bool)
            }
            picture = partial(image_of, row[self.image_column], self.storage, where)
            yield SourceItem(where, picture, _text_reader(row[self.caption_column]), extra)

    def fingerprint(self) -> str:
        return self.table.fingerprint()

    def _column(self, known: Iterable[str], what: str) -> str:
        by_name = {name.lower(): name for name in self.table.columns}
        if (found := next((by_name[name] for name in known if name in by_name), None)) is not None:
            return found
        table = self.table.address
        if any(name in self.table.columns for name in URL_COLUMNS) and known is PICTURE_COLUMNS:
            raise BadInput(f"{table}: holds addresses of pictures, not pictures; fetch them with img2dataset")
        names = ", ".join(self.table.columns[:8]) or "(none)"
        raise BadInput(f"{table}: no column for {what} among {names}; name it one of {', '.join(known)}")


class TarSource:
    """WebDataset tars: in each sample an image, and a caption as .txt, .caption or an entry of the .json."""

    def __init__(self, tars: str | os.PathLike | list[Path]):
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
    extra = _json_member(sample)
    caption = next((extra[name] for name in CAPTION_COLUMNS if name in extra), None)
    for extension in CAPTION_EXTENSIONS:
        if extension in sample.members:
            caption = bytes(sample.members[extension]).decode("utf-8", "surrogateescape")
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            read = partial(bytes, sample.members[extension])
            return SourceItem(f"{sample.key}.{extension}", read, _text_reader(caption), extra)
    missing = _raiser("missing image", f"{sample.key}: members {', '.join(sample.members)}, none an image")
    return SourceItem(sample.key, missing, _text_reader(caption), extra)


def _json_member(sample: Sample) -> dict[str, Any]:
    """The sample's .json as an object; empty if there is none, or none that can be read."""
    try:
        content = json.loads(bytes(sample.members.get("json", b"{}")))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _lines(file: io.TextIOWrapper, table: str) -> Iterator[str]:
    """The lines of a table. Raises BadInput for one that is longer than TABLE_LINE."""
    for number in count(1):
        line = file.readline(TABLE_LINE.size + 1)
        if len(line) > TABLE_LINE.size:
            raise BadInput(f"{table}: line {number:,} has more than {TABLE_LINE.size:,} characters; mend or remove it")
        if not line:
            return
        yield line


def _jsonl_rows(file: Iterable[str], table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{table}: line {number:,} is not JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise BadInput(f"{table}: line {number:,} is {type(row).__name__}, not a JSON object; mend or remove it")
        yield number, row


def _csv_rows(file: Iterable[str], table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                raise BadInput(
                    f"{table}: line {reader.line_num:,} has not the header's {wanted} fields; mend its quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{table}: line {reader.line_num:,} is not CSV ({error}); mend or remove it") from None


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    """A name without its extension."""
    return str(PurePosixPath(name).with_suffix(""))


def _text_reader(value: Any) -> Callable[[], str]:
    def read() -> str:
        if value is None:
            raise BadSample("missing caption", "there is no caption")
        if not isinstance(value, str):
            raise BadSample("missing caption", f"the caption is {type(value).__name__}, not a text")
        return value

    return read


def _no_image_for(caption: str) -> Callable[[], bytes]:
    return _raiser("missing image", f"{PurePosixPath(caption).name} is a caption without an image of the same name")


def _raiser(reason: str, detail: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise BadSample(reason, detail)

    return read


def read_wdinfo(path: Path) -> list[str]:
    """The tars that a `wdinfo.pkl` lists, as it names them. Raises BadInput for a file that is none."""
    try:
        info = load_plain(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    tars = info.get("tar_files") if isinstance(info, dict) else None
    if not isinstance(tars, list) or not tars or not all(isinstance(tar, str) for tar in tars):
        raise BadInput(f"{path}: not a wdinfo.pkl: it has no list tar_files of names")
    return tars
