"""The metrics of a run as CSV files: a row for a step, columns of the first row."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from latentsmith.files.atomic import write_text

METRICS_FILE = "metrics.csv"


def without_nan(value: float) -> float | str:
    """Return a value as a cell: NaN, which was not there to be measured, is an empty one."""
    return "" if math.isnan(value) else value


def append_row(path: Path, row: Mapping[str, float | str]) -> None:
    """Add a row to a CSV whose columns are those of its first row."""
    with open(path, "a+b") as ends:
        whole = ends.tell() == 0 or (ends.seek(-1, 2), ends.read(1))[1] == b"\n"
    with open(path, "a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        header = file.readline().strip().split(",")
        if not whole:  # a row that a full disk cut short
            file.write("\n")
        columns = header if header != [""] else list(row)
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if header == [""]:
            writer.writeheader()
        writer.writerow(row)


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps that a run resumed at `step` does again, and one that was being written at a crash."""
    if not path.exists():
        return
    header, *lines = path.read_text("utf-8").splitlines(keepends=True) or [""]
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == header.count(",")]
    earlier = [line for line in whole if float(line.split(",")[0]) <= step]
    write_text(path, "".join([header, *earlier]) if earlier else "")


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.csv; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        return [{key: float(value) for key, value in row.items() if value} for row in rows]
