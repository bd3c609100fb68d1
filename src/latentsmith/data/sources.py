"""Where pictures and captions come from: folders, tables, tars. A source lists items in a fixed order, undecoded.

Errors are of two kinds. BadInput: the source itself is wrong (no pictures, a garbled line of a table, a damaged tar).
BadSample, raised when an item is read: this one sample is wrong.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from latentsmith.data.errors import BadSample
from latentsmith.data.members import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from latentsmith.data.parquet import URL_COLUMNS, ParquetTable, parquet_files, picture_of
from latentsmith.data.remote import is_remote
from latentsmith.data.shards import SET_FILE, Sample, ShardSet
from latentsmith.data.wdinfo import read_wdinfo
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, hash_file

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


def open_source(path: str | os.PathLike) -> Source:
    """The source at `path`: a folder (with `metadata.jsonl` or `.csv`, or captions beside the images, or tars), a
    .jsonl or .csv file, a .parquet or a folder of them, a tar, a pattern of tars, or NeMo's wdinfo.pkl beside them.
    BadInput if it is none of these or has nothing in it. Of an address that fsspec opens: tars."""
    if is_remote(path):
        return TarSource(str(path))
    path = Path(path)
    if path.is_dir():
        tables = [path / name for name in TABLES if (path / name).exists()]
        if tables:
            return TableSource(tables[0])
        tars = (path / SET_FILE).exists() or any(path.glob("*.tar"))  # img2dataset leaves a .parquet beside each
        if not tars and not any(_images_in(path)) and parquet_files(path):
            return ParquetSource(path)
        if (path / SET_FILE).exists() or (any(path.glob("*.tar")) and not any(_images_in(path))):
            return TarSource(path)
        return FolderSource(path)
    if path.suffix.lower() in (".jsonl", ".csv") and path.is_file():
        return TableSource(path)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return ParquetSource(path)
    if path.suffix.lower() == ".tar":
        return TarSource(path)
    if not path.exists():
        raise BadInput(f"{path}: no such folder or file")
    if path.suffix.lower() == ".pkl":
        return TarSource([path.parent / tar for tar in read_wdinfo(path)])
    raise BadInput(
        f"{path}: not a source; it takes a folder of images, a .jsonl or .csv table, or WebDataset .tar files"
    )


class FolderSource:
    """Images anywhere below a folder, by name, each with its caption in `NAME.txt` or `NAME.caption` beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        images = sorted(_images_in(folder))
        if not images:
            raise BadInput(f"{folder}: no images here; known extensions: {', '.join(IMAGE_EXTENSIONS)}")
        captioned = {image.with_suffix("") for image in images}
        orphans = (path for path in _files_in(folder, CAPTION_EXTENSIONS) if path.with_suffix("") not in captioned)
        self.paths = images + sorted(orphans)

    def __len__(self) -> int:
        return len(self.paths)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for path in self.paths[start:]:
            name = path.relative_to(self.folder).as_posix()
            if _extension(path) in CAPTION_EXTENSIONS:
                yield SourceItem(name, _no_image_for(path), lambda: "")
            else:
                yield SourceItem(name, _file_reader(path), _caption_beside(path))

    def fingerprint(self) -> str:
        return fingerprint_text(
            "\n".join(f"{path.relative_to(self.folder)} {path.stat().st_size}" for path in self.paths)
        )


class TableSource:
    """A .jsonl or .csv file: one row per sample, with a column for the image's path, relative to the table, and one for
    the caption; every other column is kept as JSON. BadInput, with the line's number, for a table that cannot be read.
    """

    def __init__(self, table: Path):
        self.table = table
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            raise BadInput(f"{table}: an empty table; it needs rows with file_name and text")
        self.image_column = self._column(first[1], IMAGE_COLUMNS, "the image's path")
        self.caption_column = self._column(first[1], CAPTION_COLUMNS, "the caption")
        self._length = 1 + sum(1 for _ in rows)

    def __len__(self) -> int:
        return self._length

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for line, row in islice(self._rows(), start, None):
            name, caption = row.get(self.image_column), row.get(self.caption_column)
            extra = {key: value for key, value in row.items() if key not in (self.image_column, self.caption_column)}
            if isinstance(name, str) and name:
                yield SourceItem(name, _file_reader(self.table.parent / name), _text_reader(caption), extra)
            else:
                where = f"line {line:,} of {self.table.name}"
                yield SourceItem(where, _raiser("missing image", f"{where}: no {self.image_column}"), lambda: "")

    def fingerprint(self) -> str:
        return hash_file(self.table)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return _jsonl_rows(self.table) if self.table.suffix.lower() == ".jsonl" else _csv_rows(self.table)

    def _column(self, row: Mapping[str, Any], known: Iterable[str], what: str) -> str:
        for column in known:
            if column in row:
                return column
        names = ", ".join(map(str, list(row)[:8])) or "(none)"
        raise BadInput(f"{self.table}: no column for {what} among {names}; name it one of {', '.join(known)}")


class ParquetSource:
    """Parquet files: a column with the image (bytes, a path beside the table, or both as Hugging Face has them), one
    with the caption; other columns that JSON can hold are kept."""

    def __init__(self, path: Path):
        self.table = ParquetTable(path)
        if not len(self.table):
            raise BadInput(f"{path}: the table has no rows")
        self.image_column = self._column(PICTURE_COLUMNS, "the image (bytes or a path)")
        self.caption_column = self._column(CAPTION_COLUMNS, "the caption")

    def __len__(self) -> int:
        return len(self.table)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        folder = self.table.path if self.table.path.is_dir() else self.table.path.parent
        for where, row in self.table.rows(start):
            extra = {
                key: value
                for key, value in row.items()
                if key not in (self.image_column, self.caption_column) and isinstance(value, str | int | float | bool)
            }
            picture = partial(picture_of, row[self.image_column], folder, where)
            yield SourceItem(where, picture, _text_reader(row[self.caption_column]), extra)

    def fingerprint(self) -> str:
        return self.table.fingerprint()

    def _column(self, known: Iterable[str], what: str) -> str:
        by_name = {name.lower(): name for name in self.table.columns}
        if (found := next((by_name[name] for name in known if name in by_name), None)) is not None:
            return found
        if any(name in self.table.columns for name in URL_COLUMNS) and known is PICTURE_COLUMNS:
            raise BadInput(f"{self.table.path}: holds addresses of pictures, not pictures; fetch them with img2dataset")
        names = ", ".join(self.table.columns[:8]) or "(none)"
        raise BadInput(f"{self.table.path}: no column for {what} among {names}; name it one of {', '.join(known)}")


class TarSource:
    """WebDataset tars: in each sample an image, and a caption as .txt, .caption or an entry of the .json."""

    def __init__(self, tars: str | Path | list[Path]):
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


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{table}: line {number:,} is not JSON ({error}); mend or remove it") from None
            if not isinstance(row, dict):
                raise BadInput(
                    f"{table}: line {number:,} is {type(row).__name__}, not a JSON object; mend or remove it"
                )
            yield number, row


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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


def _files_in(folder: Path, extensions: Iterable[str]) -> Iterator[Path]:
    """Files of these extensions at any depth, without hidden ones and what macOS puts beside files in archives."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and _extension(path) in extensions:
                yield path


def _images_in(folder: Path) -> Iterator[Path]:
    return _files_in(folder, IMAGE_EXTENSIONS)


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _file_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = "missing image" if not os.path.lexists(path) else "unreadable file"
            raise BadSample(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from None

    return read


def _caption_beside(image: Path) -> Callable[[], str]:
    def read() -> str:
        for extension in CAPTION_EXTENSIONS:
            path = image.with_suffix(f".{extension}")
            if path.exists():
                return path.read_bytes().decode("utf-8-sig", "surrogateescape")
        raise BadSample("missing caption", f"no {image.stem}.txt or {image.stem}.caption beside {image.name}")

    return read


def _text_reader(value: Any) -> Callable[[], str]:
    def read() -> str:
        if value is None:
            raise BadSample("missing caption", "there is no caption")
        if not isinstance(value, str):
            raise BadSample("missing caption", f"the caption is {type(value).__name__}, not a text")
        return value

    return read


def _no_image_for(caption: Path) -> Callable[[], bytes]:
    return _raiser("missing image", f"{caption.name} is a caption without an image of the same name")


def _raiser(reason: str, detail: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise BadSample(reason, detail)

    return read
