"""The metrics of a run as CSV files: a row for a step."""

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
    """Add a row to a CSV. Columns that it lacks are added, empty in the rows before."""
    columns = _columns(path)
    if columns and (new := [name for name in row if name not in columns]):
        _add_columns(path, new)
        columns += new
    with open(path, "a+b") as ends:
        whole = ends.tell() == 0 or (ends.seek(-1, 2), ends.read(1))[1] == b"\n"
    with open(path, "a", encoding="utf-8", newline="") as file:
        if not whole:  # a row that a full disk cut short
            file.write("\n")
        writer = csv.DictWriter(file, columns or list(row), lineterminator="\n")
        if not columns:
            writer.writeheader()
        writer.writerow(row)


def _columns(path: Path) -> list[str]:
    """Return the names in the first row of a CSV; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        header = file.readline().strip()
    return header.split(",") if header else []


def _add_columns(path: Path, names: list[str]) -> None:
    """Add columns to a CSV; a row that was cut short is left out."""
    header, *rows = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    longer = [line.rstrip("\n") + "," * len(names) + "\n" for line in rows]
    write_text(path, "".join([",".join([header.rstrip("\n"), *names]) + "\n", *longer]))


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
