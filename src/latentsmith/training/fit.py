"""One training from where its counters stand to max_steps, through Lightning."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from .checkpoint import checkpoints_in, load_checkpoint, read_state, save_checkpoint
from .log import ScalarLog
from .module import StepCallback, TrainingModule
from .progress_bar import ProgressLine
from .samples import RunPositions, RunSamples, run_loader
from .stopping import StopOnSignal


@dataclass(frozen=True)
class Checkpointing:
    """Where checkpoints go, how often (0: the last step only), how many stay (-1: all), and their files' metadata.

    resume: the checkpoint to go on from. enabled: False writes none at all.
    """

    folder: Path
    every_n_steps: int
    keep: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    resume: Path | None = None
    enabled: bool = True


class SaveCheckpoints(StepCallback):
    """Saves at optimizer-step boundaries, and after the last step."""

    def __init__(self, checkpointing: Checkpointing):
        self.to = checkpointing

    def on_step_end(self, trainer, module) -> None:
        every = self.to.every_n_steps
        if every and module.progress.global_step % every == 0:
            self._save(module)

    def on_train_end(self, trainer, module) -> None:
        newest = checkpoints_in(self.to.folder)
        if not newest or newest[-1].name != f"step-{module.progress.global_step:08d}":
            self._save(module)

    def _save(self, module: TrainingModule) -> None:
        if module.trainer.is_global_zero:
            save_checkpoint(self.to.folder, module, self.to.keep, self.to.metadata)


class Resume(L.Callback):
    """Puts the module back to a checkpoint once its optimizer exists."""

    def __init__(self, path: Path):
        self.path = path

    def on_fit_start(self, trainer, module) -> None:
        load_checkpoint(self.path, module)


@dataclass(frozen=True)
class Data:
    """A run's samples, how they are cut into batches, and the processes that read them."""

    samples: RunSamples
    micro_batch: int
    num_workers: int = 0


class PositionsFrom(L.LightningDataModule):
    """Batches from the module's `consumed_samples` on: no state of a loader is ever needed to go on."""

    def __init__(self, data: Data, module: TrainingModule, start: int):
        super().__init__()
        self.data, self.module, self.start = data, module, start

    def train_dataloader(self):
        assert self.trainer is not None
        positions = RunPositions(
            start=self.start,
            global_batch=self.module.optimisation.global_batch,
            micro_batch=self.data.micro_batch,
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
        )
        return run_loader(self.data.samples, positions, num_workers=self.data.num_workers)


def fit(
    module: TrainingModule,
    data: Data,
    max_steps: int,
    run_folder: Path,
    checkpointing: Checkpointing,
    *,
    log_every_n_steps: int = 10,
    tensorboard: bool = True,
    progress_bar: bool = True,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> None:
    """Train `module` until its step counter is at max_steps, from the checkpoint in `checkpointing` if there is one.

    trainer_options: of lightning.Trainer (devices, accelerator, precision, gradient_clip_val, strategy, ...).
    """
    begin = read_state(checkpointing.resume) if checkpointing.resume else {"global_step": 0, "consumed_samples": 0}
    if begin["global_step"] >= max_steps:
        print(f"{run_folder}: already at step {begin['global_step']:,} of {max_steps:,}; nothing to do")
        return
    extra: list[L.Callback] = [Resume(checkpointing.resume)] if checkpointing.resume else []
    extra += [ProgressLine(max_steps)] if progress_bar else []
    extra += [ScalarLog(run_folder, log_every_n_steps, tensorboard=tensorboard)]
    extra += [SaveCheckpoints(checkpointing)] if checkpointing.enabled else []
    quiet_lightning()
    stop = StopOnSignal()
    trainer = L.Trainer(
        max_steps=max_steps - begin["global_step"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*extra, *callbacks, stop],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **trainer_options,
    )
    trainer.fit(module, PositionsFrom(data, module, begin["consumed_samples"]))
    stop.raise_if_stopped(max_steps)


def quiet_lightning() -> None:
    """Keep Lightning's hints and deprecations of its own making off the terminal; its errors still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
