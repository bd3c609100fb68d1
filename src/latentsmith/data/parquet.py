"""Parquet tables of captioned pictures, as Hugging Face's data sets and many scrapers leave them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text

from .errors import BadSample
from .storage import Storage

ROWS = 256  # read at a time
URL_COLUMNS = ("url", "image_url", "URL")


class ParquetTable:
    """Rows of one or more .parquet files, in order, read in small batches from any row on.

    Raises BadInput for files that are none, and where pyarrow is not installed.
    """

    def __init__(self, storage: Storage, names: Sequence[str]):
        self.names = names
        self.address = f"{storage.address}/{names[0]}" if len(names) == 1 else storage.address
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise BadInput(f"{self.address}: parquet needs pyarrow; pip install 'latentsmith[parquet]'") from None
        with self._read():
            opened = [storage.open(name) for name in names]
            self.sizes = [file.seek(0, os.SEEK_END) for file in opened]
            self.files = [parquet.ParquetFile(file) for file in opened]
        self.columns = list(self.files[0].schema_arrow.names)

    @contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # of pyarrow, the file system, or the protocol behind it
            what = " ".join(str(error).split())[:160] or type(error).__name__
            raise BadInput(f"{self.address}: not readable as parquet ({what})") from None

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self.files)

    def rows(self, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) from row `start` on; row groups before it are not read."""
        for name, file in zip(self.names, self.files, strict=True):
            if start >= file.metadata.num_rows:
                start -= file.metadata.num_rows
                continue
            number, groups = 0, []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows > start:
                    groups = list(range(group, file.num_row_groups))
                    break
                number += rows
            batches = file.iter_batches(ROWS, row_groups=groups)
            while True:
                with self._read():
                    batch = next(batches, None)
                if batch is None:
                    break
                skipped = min(max(0, start - number), batch.num_rows)
                for offset, row in enumerate(batch.slice(skipped).to_pylist(), skipped):
                    yield f"row {number + offset:,} of {PurePosixPath(name).name}", row
                number += batch.num_rows
            start = 0

    def fingerprint(self) -> str:
        names = (PurePosixPath(name).name for name in self.names)
        return fingerprint_text("\n".join(f"{name} {size}" for name, size in zip(names, self.sizes, strict=True)))


def image_of(value: Any, storage: Storage, where: str) -> bytes:
    """The bytes of a picture in a column: bytes, a path beside the table, or Hugging Face's {bytes, path}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadSample("missing image", f"{where}: holds no picture")
    try:
        return storage.read(value)
    except BadSample as error:
        raise BadSample(error.reason, f"{where}: {error}") from None
