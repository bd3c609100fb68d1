"""Scalars of a training: a CSV and TensorBoard events, both by optimizer step."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.tensorboard import SummaryWriter

from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput

from .module import StepCallback, TrainingModule, tolerated

METRICS_FILE = "metrics.csv"


class ScalarLog(StepCallback):
    """Writes every scalar of the module each `every_n_steps` optimizer steps into `folder`/metrics.csv, and into
    TensorBoard events in `folder`/tensorboard if `tensorboard`. wandb: arguments of Lightning's WandbLogger, which then
    gets the scalars too; BadInput where wandb is not installed."""

    def __init__(
        self, folder: Path, every_n_steps: int, *, tensorboard: bool = True, wandb: Mapping[str, Any] | None = None
    ):
        self.folder, self.every_n_steps, self.tensorboard = folder, every_n_steps, tensorboard
        self.events: SummaryWriter | None = None
        self.wandb = None if wandb is None else wandb_logger(folder, wandb)

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        drop_rows_after(self.folder / METRICS_FILE, module.progress.global_step)
        if self.tensorboard:
            self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=module.progress.global_step + 1)

    def on_step_end(self, trainer, module) -> None:
        step = module.progress.global_step
        if trainer.is_global_zero:
            self.send(module.metrics.once, step)
            for name, pixels in module.metrics.pictures.items() if self.events else ():
                self.events.add_image(name, pixels, step, dataformats="HWC")  # type: ignore[union-attr]
        module.metrics.once.clear()
        module.metrics.pictures.clear()
        if step % self.every_n_steps:
            return
        values = over_processes(module, module.metrics.read())
        if not trainer.is_global_zero:
            return
        with tolerated(f"row of step {step:,}"):
            row = {name: shown(value) for name, value in values.items()}
            append_row(self.folder / METRICS_FILE, {"step": step, **row})
        self.send(values, step)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """To TensorBoard and Weights & Biases, where they are asked for."""
        named = {f"train/{name}": value for name, value in values.items()}
        for name, value in named.items() if self.events else ():
            self.events.add_scalar(name, value, step)  # type: ignore[union-attr]
        if self.wandb is not None and named:
            self.wandb.log_metrics(named, step)

    def on_train_end(self, trainer, module) -> None:
        if self.events:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finalize("success")


def wandb_logger(folder: Path, options: Mapping[str, Any]) -> Any:
    """Lightning's logger to Weights & Biases, writing into the run folder; only the first process talks to it."""
    from lightning.pytorch.loggers import WandbLogger

    try:
        return WandbLogger(**{"save_dir": str(folder), "project": "latentsmith", "name": folder.name, **options})
    except ModuleNotFoundError:
        raise BadInput("exp_manager.create_wandb_logger=true: wandb is not installed; pip install wandb") from None
    except TypeError as error:
        raise BadInput(f"exp_manager.wandb_logger_kwargs: {error}") from None


def over_processes(module: TrainingModule, values: dict[str, float]) -> dict[str, float]:
    """The means of every process' scalars, without those that one has not; all processes must ask."""
    if module.trainer.world_size == 1:
        return values
    gathered: Any = module.all_gather(torch.tensor(list(values.values()), dtype=torch.float32, device=module.device))
    return dict(zip(values, gathered.nanmean(0).tolist(), strict=True))


def shown(value: float) -> float | str:
    """NaN as an empty cell: what was not there to be measured."""
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
    kept = [line for line in whole if float(line.split(",")[0]) <= step]
    write_text(path, "".join([header, *kept]) if kept else "")


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        return [{key: float(value) for key, value in row.items() if value} for row in rows]
