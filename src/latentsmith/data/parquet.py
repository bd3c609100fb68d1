"""Parquet tables of captioned pictures, as Hugging Face's data sets and many scrapers leave them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentsmith.data.errors import BadSample
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text

ROWS = 256  # read at a time
URL_COLUMNS = ("url", "image_url", "URL")


def parquet_files(path: Path) -> list[Path]:
    """The .parquet files that a file or folder stands for, in the order of their names."""
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


class ParquetTable:
    """Rows of one or more .parquet files, in order, read in small batches from any row on.

    Raises BadInput for files that are none, and where pyarrow is not installed.
    """

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise BadInput(f"{path}: parquet needs pyarrow; pip install 'latentsmith[parquet]'") from None
        self.path, self.paths = path, parquet_files(path)
        try:
            self.files = [parquet.ParquetFile(one, memory_map=True) for one in self.paths]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise BadInput(f"{path}: not readable as parquet ({' '.join(str(error).split())[:160]})") from None
        self.columns = list(self.files[0].schema_arrow.names) if self.files else []

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self.files)

    def rows(self, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) from row `start` on; row groups before it are not read."""
        for path, file in zip(self.paths, self.files, strict=True):
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
            for batch in file.iter_batches(ROWS, row_groups=groups):
                skipped = min(max(0, start - number), batch.num_rows)
                for offset, row in enumerate(batch.slice(skipped).to_pylist(), skipped):
                    yield f"row {number + offset:,} of {path.name}", row
                number += batch.num_rows
            start = 0

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join(f"{path.name} {path.stat().st_size}" for path in self.paths))


def picture_of(value: Any, folder: Path, where: str) -> bytes:
    """The bytes of a picture in a column: bytes, a path beside the table, or Hugging Face's {bytes, path}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadSample("missing image", f"{where}: holds no picture")
    try:
        return (folder / value).read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample("missing image", f"{where}: {value}: {getattr(error, 'strerror', None) or error}") from None
