"""Tables of images and captions: .jsonl and .csv, and parquet as Hugging Face's data sets have it."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, hash_stream
from latentsmith.files.regular import TABLE_LINE
from latentsmith.files.text import LFS_ADVICE, LFS_POINTER, encoding_of

from .errors import BadSample
from .sample_io import IMAGE_EXTENSIONS
from .storage import Storage, errors_reported, is_remote

PARQUET_ROWS = 256  # read at a time
CSV_ERRORS = {  # of Python's reader, in words
    "unexpected end of data": "a quote is opened and never closed",
    **{
        f"'{delimiter}' expected after '\"'": 'text after a closing quote; a quote inside quotes is written twice: ""'
        for delimiter in ",;\t|"
    },
}
# A line of a field that looks like a row of the table: a name with an extension of images, then a delimiter.
SWALLOWED_ROW = re.compile(rf"\n[^\n,;\t|\"]*\.(?:{'|'.join(IMAGE_EXTENSIONS)})[\"']?[,;\t|]", re.IGNORECASE)


class Table(Protocol):
    """Rows in order. address: what to call the table in errors. columns: their names."""

    address: str
    columns: list[str]

    def __len__(self) -> int: ...

    def rows(self, start: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (where, row) from row number `start` on."""

    def keeps(self, value: Any) -> bool:
        """Return whether a value of another column than image and caption is kept, as JSON."""

    def fingerprint(self) -> str: ...


class TextTable:
    """A .jsonl or .csv file. Raises BadInput, with the line's number, for one that cannot be read."""

    def __init__(self, storage: Storage, name: str):
        self.storage, self.name = storage, name
        self.address = f"{storage.address}/{name}"
        rows = self.rows()
        first = next(rows, None)
        if first is None:
            raise BadInput(f"{self.address}: an empty table; it needs rows with file_name and text")
        self.columns = list(first[1])
        self._length = 1 + sum(1 for _ in rows)

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
        parse = _jsonl_rows if self.name.lower().endswith(".jsonl") else _csv_rows
        with errors_reported(self.address), self.storage.open(self.name) as file:
            text = io.TextIOWrapper(file, encoding_of(_head(file, self.address)), "surrogateescape", newline="")
            for line, row in islice(parse(_lines(text, self.address), self.address), start, None):
                yield f"line {line:,} of {self.name}", row

    def keeps(self, value: Any) -> bool:
        return True

    def fingerprint(self) -> str:
        with errors_reported(self.address), self.storage.open(self.name) as file:
            return hash_stream(file)


class ParquetTable:
    """One or more .parquet files, one after the other, read in small batches.

    Raises BadInput for files that are none, and where pyarrow is not installed.
    """

    def __init__(self, storage: Storage, names: Sequence[str]):
        self.names = names
        self.address = f"{storage.address}/{names[0]}" if len(names) == 1 else storage.address
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise BadInput(f"{self.address}: parquet needs pyarrow; pip install 'latentsmith[parquet]'") from None
        self.storage, self.columns = storage, list[str]()
        self.groups: list[list[int]] = []  # rows of each row group of each file
        for name in names:
            with self._errors_reported(), storage.open(name) as file:
                _head(file, f"{storage.address}/{name}")
                opened = parquet.ParquetFile(file)
                self.columns = self.columns or list(opened.schema_arrow.names)
                rows = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
                self.groups.append(rows)
        if not len(self):
            raise BadInput(f"{self.address}: the table has no rows")

    def __len__(self) -> int:
        return sum(map(sum, self.groups))

    def rows(self, start: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (where, row) from row number `start` on; files and row groups before it are not read."""
        for name, sizes in zip(self.names, self.groups, strict=True):
            if start < sum(sizes):
                yield from self._rows_of(name, sizes, start)
            start = max(0, start - sum(sizes))

    def _rows_of(self, name: str, sizes: list[int], start: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        import pyarrow.parquet as parquet

        number, groups = 0, list(range(len(sizes)))
        while number + sizes[groups[0]] <= start:
            number += sizes[groups.pop(0)]
        with self._errors_reported():
            file = self.storage.open(name)  # one at a time: thousands of open files are over a process's limit
        with file:
            with self._errors_reported():
                batches = parquet.ParquetFile(file).iter_batches(PARQUET_ROWS, row_groups=groups)
            while (batch := self._next(batches)) is not None:
                skipped = min(max(0, start - number), batch.num_rows)
                for offset, row in enumerate(batch.slice(skipped).to_pylist(), skipped):
                    yield f"row {number + offset:,} of {PurePosixPath(name).name}", row
                number += batch.num_rows

    def keeps(self, value: Any) -> bool:
        return isinstance(value, str | int | float | bool)

    def fingerprint(self) -> str:
        return fingerprint_text(
            "\n".join(f"{PurePosixPath(name).name} {self.storage.state(name)}" for name in self.names)
        )

    def _next(self, batches: Iterator[Any]) -> Any:
        with self._errors_reported():
            return next(batches, None)

    @contextmanager
    def _errors_reported(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # of pyarrow, the file system, or the protocol behind it
            what = " ".join(str(error).split())[:160] or type(error).__name__
            raise BadInput(f"{self.address}: not readable as parquet ({what})") from None


def image_bytes(value: Any, storage: Storage, where: str) -> bytes:
    """Return the image in a cell: bytes, a path beside the table, or Hugging Face's {bytes, path}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, int | float):
        raise BadSample("missing image", f"{where}: the image is the number {value}, not a file name in quotes")
    if not isinstance(value, str) or not value:
        raise BadSample("missing image", f"{where}: holds no image")
    if is_remote(value):
        raise BadSample("missing image", f"{where}: {value} is an address; fetch it with img2dataset")
    if "\\" in value and not storage.exists(value):  # written on Windows
        value = value.replace("\\", "/")
    try:
        return storage.read(value)
    except BadSample as error:
        raise BadSample(error.reason, f"{where}: {error}") from None


def _head(file: BinaryIO, table: str) -> bytes:
    """Return the first bytes of a table, and go back. Raises BadInput for a Git LFS pointer."""
    head = file.read(len(LFS_POINTER))
    file.seek(0)
    if head == LFS_POINTER:
        raise BadInput(f"{table}: {LFS_ADVICE}")
    return head


def _lines(file: io.TextIOWrapper, table: str) -> Iterator[str]:
    """Yield the lines of a table. Raises BadInput for one that is longer than TABLE_LINE."""
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


def _csv_rows(lines: Iterator[str], table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a CSV file whose header names its columns, between commas, semicolons, tabs or bars."""
    header = next(lines, "")
    skipped = 1 if header.lower().startswith("sep=") else 0  # Excel's first line
    header = next(lines, "") if skipped else header
    delimiter = max(",;\t|", key=header.count)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    columns: list[str] = []
    while True:
        start = reader.line_num + 1 + skipped
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BadInput(
                f"{table}: line {start:,} is not CSV ({CSV_ERRORS.get(str(error), error)}); mend it"
            ) from None
        if row is None:
            return
        if not row:
            continue
        if not columns:
            columns = _unique([name.strip() for name in row], table)
            continue
        if len(row) != len(columns):
            raise BadInput(f"{table}: line {start:,} has not the header's {len(columns)} fields; mend its quotes")
        if reader.line_num + skipped > start and any(SWALLOWED_ROW.search(field) for field in row):
            raise BadInput(f"{table}: line {start:,} opens a quote that is not closed before the next rows; mend it")
        yield start, dict(zip(columns, row, strict=True))


def _unique(columns: list[str], table: str) -> list[str]:
    """Return the columns of a CSV file. Raises BadInput if two have one name."""
    for number, name in enumerate(columns):
        if name and name.lower() in (other.lower() for other in columns[:number]):
            raise BadInput(f"{table}: two columns are named {name!r}; rename one of them")
    return columns
