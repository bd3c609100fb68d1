"""Scalars of a training: a CSV and TensorBoard events, both by optimizer step."""

import csv
from pathlib import Path

import lightning as L
from torch.utils.tensorboard import SummaryWriter

from .module import TrainingModule


class ScalarLog(L.Callback):
    """Writes every scalar of the module each `every_n_steps` optimizer steps into `folder`/metrics.csv, and into
    TensorBoard events in `folder`/tensorboard if `tensorboard`."""

    def __init__(self, folder: Path, every_n_steps: int, *, tensorboard: bool = True):
        self.folder, self.every_n_steps, self.tensorboard = folder, every_n_steps, tensorboard
        self.events: SummaryWriter | None = None

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        if self.tensorboard:
            self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=module.progress.global_step + 1)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.progress.global_step
        if step % self.every_n_steps or not trainer.is_global_zero:
            return
        values = module.metrics.read()
        append_row(self.folder / "metrics.csv", {"step": step, **values})
        for name, value in values.items() if self.events else ():
            self.events.add_scalar(f"train/{name}", value, step)  # type: ignore[union-attr]

    def on_train_end(self, trainer, module) -> None:
        if self.events:
            self.events.close()


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add a row to a CSV whose columns are those of its first row; a new column starts the file's next table."""
    header = path.read_text("utf-8").splitlines()[0].split(",") if path.exists() else list(row)
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
