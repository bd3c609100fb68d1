"""report.html of a training, renewed while it runs: what is trained, how the losses go, what it draws."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from latentsmith import html_report

from .metrics_log import METRICS_FILE, read_rows
from .module import StepCallback, tolerated
from .validation import VALIDATION_FILE

SECONDS = 60.0  # between two renewals
POINTS = 1500  # of a curve
ROWS_OF_SAMPLES = 6
CURVES = {
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
    "samples_per_second": "Samples a second",
}


class RunReport(StepCallback):
    """Renews `folder`/report.html every minute and at the end. head: lines that say what is trained."""

    def __init__(self, folder: Path, head: Sequence[str]):
        self.folder, self.head, self.written = folder, list(head), 0.0

    def on_step_end(self, trainer, module) -> None:
        if trainer.is_global_zero and time.monotonic() - self.written > SECONDS:
            self.write()

    def on_train_end(self, trainer, module) -> None:
        if trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        with tolerated("report.html"):
            write_run_report(self.folder, self.head)
        self.written = time.monotonic()


def write_run_report(folder: Path, head: Sequence[str]) -> Path:
    """Write the page from what the run folder holds; returns it."""
    rows, held_out = read_rows(folder / METRICS_FILE), read_rows(folder / VALIDATION_FILE)
    sections = [("What is trained", html_report.code(head))]
    if rows:
        newest = {name: f"{value:.6g}" for name, value in rows[-1].items()}
        sections += [
            ("Loss", html_report.curve(thinned(rows), "loss")),
            ("Now", html_report.table([*newest], [[*newest.values()]])),
        ]
    if held_out:
        names = [name for name in ("val_loss", "val_loss_ema") if name in held_out[-1]]
        lines = [[f"{row['step']:.0f}", *(f"{row[name]:.6g}" for name in names)] for row in held_out[-10:]]
        curves = "".join(html_report.paragraph(name) + html_report.curve(thinned(held_out), name) for name in names)
        sections.append(("Validation loss", curves + html_report.table(["step", *names], lines)))
    samples = sorted((folder / "samples").glob("*.png"))
    if samples:
        chosen = spread(samples, ROWS_OF_SAMPLES)
        sections.append(("Samples", "".join(html_report.picture(path, path.stem, 900) for path in chosen)))
    for name, title in CURVES.items():
        if any(name in row for row in rows):
            sections.append((title, html_report.curve(thinned(rows), name)))
    sections.append(("Made by", html_report.code(made_by(folder))))
    page = folder / "report.html"
    html_report.write_report(page, folder.name, sections)
    return page


def thinned(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most POINTS of them, evenly spaced, the last among them."""
    return list(rows[:: -(-len(rows) // POINTS) or 1]) + ([rows[-1]] if len(rows) > POINTS else [])


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """The first, the last, and some between, evenly spaced."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(place * (len(paths) - 1) / (count - 1))] for place in range(count)]


def made_by(folder: Path) -> list[str]:
    path = folder / "versions.json"
    versions = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return [f"{name}: {value}" for name, value in versions.items()]
