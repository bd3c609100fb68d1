"""One training from where its counters stand to max_steps, through Lightning."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed

from latentsmith.data.loader import RunPositions, RunSamples, no_worker_left, run_loader
from latentsmith.files.errors import BadInput

from .checkpoint import load_checkpoint, read_state
from .checkpointing import Checkpointing, SaveCheckpoints
from .metrics_log import ScalarLog
from .module import TrainingModule
from .nonfinite import WatchNonFinite
from .progress_bar import DataWait, ProgressLine
from .signals import StopOnSignal


class Resume(L.Callback):
    """Puts the module back to a checkpoint, if there is one, once its optimizer exists."""

    def __init__(self, path: Path | None):
        self.path = path

    def on_fit_start(self, trainer, module) -> None:
        here = self.path.name if self.path else "none"
        first = trainer.strategy.broadcast(here)
        if first != here:
            raise BadInput(
                f"goes on from checkpoint {here}, and the first process from {first}: give them one run folder"
            )
        if self.path:
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
    wandb: Mapping[str, Any] | None = None,
    progress_bar: bool = True,
    nonfinite_limit: int = 10,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> None:
    """Train `module` until its step counter is at max_steps, from the checkpoint in `checkpointing` if there is one.

    nonfinite_limit: so many steps in a row without a finite gradient end it (TooManyNonFinite).
    trainer_options: of lightning.Trainer (devices, accelerator, precision, gradient_clip_val, strategy, ...).
    """
    begin = read_state(checkpointing.resume) if checkpointing.resume else {"global_step": 0, "consumed_samples": 0}
    if begin["global_step"] >= max_steps:
        print(f"{run_folder}: already at step {begin['global_step']:,} of {max_steps:,}; nothing to do")
        return
    extra: list[L.Callback] = [Resume(checkpointing.resume)]
    extra += callbacks
    extra += [ProgressLine(max_steps)] if progress_bar else []
    extra += [ScalarLog(run_folder, log_every_n_steps, tensorboard=tensorboard, wandb=wandb)]
    watch = WatchNonFinite(run_folder, data.samples, nonfinite_limit, log_every_n_steps)
    extra += [watch]
    extra += [SaveCheckpoints(checkpointing, max_steps)] if checkpointing.enabled else []
    quiet_lightning()
    stop = StopOnSignal()
    trainer = L.Trainer(
        max_steps=max_steps - begin["global_step"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*extra, stop, *([DataWait()] if progress_bar else [])],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **trainer_options,
    )
    with stop, no_worker_left():
        try:
            trainer.fit(module, PositionsFrom(data, module, begin["consumed_samples"]))
        except SystemExit:
            if stop.received is None:
                raise
            raise KeyboardInterrupt from None  # Lightning's answer to a second Ctrl-C was an exit of its own
    if torch.distributed.is_initialized():
        leave_group()
    watch.raise_if_stopped()
    stop.raise_if_stopped(max_steps)


def leave_group() -> None:
    """End the process group, and let gloo's threads drop the tensors of their last work: they need the interpreter for
    it, and one that asks for it while the process ends aborts that."""
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # without the interpreter's lock, which they wait for


def quiet_lightning() -> None:
    """Keep Lightning's hints and deprecations of its own making off the terminal; its errors still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
