"""report.html of a training, renewed while it runs: what is trained, how the losses go, the images it makes."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from latentsmith import html_report
from latentsmith.files.images import open_image
from latentsmith.html_report import Line, chart, running_mean, thinned

from .hooks import Hook, log_os_errors
from .hooks.samples import PROMPTS
from .hooks.validation import VALIDATION_FILE
from .loop import Step, Training
from .metrics_log import METRICS_FILE, read_rows

SECONDS = 60.0  # between two renewals
POINTS = 1500  # of a curve
STEPS_SHOWN = 6  # of sample images
NAMES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_per_second": "samples/s",
    "memory_gib": "peak memory, GiB",
    "data_wait": "waiting for data, share",
    "skipped_steps": "skipped steps",
    "val_loss": "trained weights",
    "val_loss_ema": "averaged weights",
}
Row = dict[str, float]


class RunReport(Hook):
    """Renews `folder`/report.html every minute and at the end. head: lines that describe what is trained."""

    def __init__(self, folder: Path, head: Sequence[str], *, clock: Callable[[], float] = time.monotonic):
        self.folder, self.head, self.clock = folder, list(head), clock
        self.written: float | None = None

    def after_step(self, training: Training, step: Step) -> None:
        if training.fabric.is_global_zero and (self.written is None or self.clock() - self.written > SECONDS):
            self.write()

    def on_end(self, training: Training) -> None:
        if training.fabric.is_global_zero:
            self.write()

    def write(self) -> None:
        with log_os_errors("report.html"):
            write_run_report(self.folder, self.head)
        self.written = self.clock()


def write_run_report(folder: Path, head: Sequence[str]) -> Path:
    """Write the page from what the run folder holds, and return its path."""
    page = folder / "report.html"
    rows, validation = read_rows(folder / METRICS_FILE), read_rows(folder / VALIDATION_FILE)
    sections = [("What is trained", html_report.code(head))]
    if rows:
        newest = {NAMES.get(name, name): short_text(value) for name, value in rows[-1].items()}
        sections += [("Now", html_report.figures(newest)), ("Loss", noisy_chart(rows, "loss", "loss"))]
    if validation:
        names = [name for name in ("val_loss", "val_loss_ema") if name in validation[-1]]
        lines = [Line(NAMES[name], thinned(column(validation, name), POINTS)) for name in names]
        cells = [[f"{row['step']:,.0f}", *(f"{row[name]:.6g}" for name in names)] for row in validation[-10:]]
        table = html_report.table(["step", *(NAMES[name] for name in names)], cells)
        sections.append(("Validation loss", chart(lines, "mean squared error", log=True) + table))
    if samples := sorted((folder / "samples").glob("*.png")):
        shown = "".join(sample_images(path, page) for path in thinned(samples, STEPS_SHOWN))
        sections.append(("Samples", shown))
    if quarters := {name for row in rows for name in row if name.startswith("loss_t")}:
        lines = [Line(title, thinned(running_mean(column(rows, name)), POINTS)) for title, name in titled(quarters)]
        sections.append(("Loss by quarter of the timesteps", chart(lines, "loss, not weighted", log=True)))
    if rows:
        speed = Line(NAMES["samples_per_second"], thinned(column(rows, "samples_per_second"), POINTS))
        sections += [
            ("Gradient norm", noisy_chart(rows, "grad_norm", "gradient norm")),
            ("Learning rate", chart([Line("lr", thinned(column(rows, "lr"), POINTS))], "learning rate")),
            ("Speed", chart([speed], "samples/s")),
        ]
    sections.append(("Made by", html_report.code(made_by(folder))))
    html_report.write_report(page, folder.name, sections)
    return page


def column(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of the rows where the column has a finite value."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def short_text(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"


def noisy_chart(rows: Sequence[Row], name: str, y_title: str) -> str:
    """Return a chart of every step's value as a dot, under their running mean."""
    points = column(rows, name)
    mean = Line("running mean", thinned(running_mean(points), POINTS))
    return chart([Line("each step", thinned(points, POINTS), dots=True), mean], y_title, log=True)


def titled(columns: Iterable[str]) -> list[tuple[str, str]]:
    """Return (title, column) of the columns loss_tN, where N is the first timestep of a quarter."""
    firsts = sorted(int(name.removeprefix("loss_t")) for name in columns)
    lasts = [f"to {first - 1}" for first in firsts[1:]] + ["and above"]
    return [(f"timesteps {first} {last}", f"loss_t{first}") for first, last in zip(firsts, lasts, strict=True)]


def sample_images(path: Path, page: Path) -> str:
    """Return the sample images of one step under a heading. path: samples/step-N.png."""
    return html_report.heading(f"step {int(path.stem.removeprefix('step-')):,}") + captioned_row(path, page)


def captioned_row(path: Path, page: Path) -> str:
    """Return the images in a file by `save_row`, each above its prompt."""
    image = open_image(path)
    return html_report.image_row(path, page, image.size, json.loads(image.info.get(PROMPTS, '[""]')))


def made_by(folder: Path) -> list[str]:
    path = folder / "versions.json"
    versions = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return [f"{name}: {value}" for name, value in versions.items()]
