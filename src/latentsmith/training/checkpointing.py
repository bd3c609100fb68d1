"""When a run's checkpoints are written: by steps and minutes, in the background where memory allows, never to the harm
of those that stand."""

import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from latentsmith.files.errors import BadInput
from latentsmith.files.memory import available_bytes

from .checkpoint import Snapshot, checkpoints_in, remove_leftovers, size_of, take_snapshot, write_checkpoint
from .module import StepCallback, TrainingModule

MARGIN = 1.25  # of a snapshot's size, that memory has to have free for a save in the background
GIB = 2**30


@dataclass(frozen=True)
class Checkpointing:
    """Where checkpoints go, how often (0: the last step only), how many stay (-1: all), and their files' metadata.

    every_n_minutes: also so long after the one before; None or 0 for steps alone. resume: the checkpoint to go on from.
    enabled: False writes none at all.
    """

    folder: Path
    every_n_steps: int
    keep: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    every_n_minutes: float | None = None
    resume: Path | None = None
    enabled: bool = True


class SaveCheckpoints(StepCallback):
    """Saves at optimizer-step boundaries, and after the last step.

    A snapshot in the memory of the CPU is written by another thread while training goes on, where there is room for
    one; else training waits. A checkpoint that cannot be written (a full disk) leaves the last one as it is and is told
    of; only the one of the end has to succeed.
    """

    def __init__(self, to: Checkpointing, max_steps: int):
        self.to, self.max_steps = to, max_steps
        self.under_way: Future[None] | None = None
        self.told_blocking = False

    def on_train_start(self, trainer, module) -> None:
        self.saved_at = time.monotonic()
        if trainer.is_global_zero:
            remove_leftovers(self.to.folder)
            check_disk(self.to, module, self.max_steps)

    def on_step_end(self, trainer, module) -> None:
        every, minutes = self.to.every_n_steps, self.to.every_n_minutes
        due = bool(every) and module.progress.global_step % every == 0
        if minutes and not due:
            due = trainer.strategy.broadcast(time.monotonic() - self.saved_at >= 60 * minutes)
        if due:
            self.save(module)

    def on_train_end(self, trainer, module) -> None:
        self.wait()
        newest = checkpoints_in(self.to.folder)
        there = bool(newest) and newest[-1].name == f"step-{module.progress.global_step:08d}"
        if trainer.strategy.broadcast(there):  # all processes have to take a snapshot, or none
            return
        if snapshot := take_snapshot(module):
            write_checkpoint(self.to.folder, snapshot, self.to.keep, self.to.metadata)

    def teardown(self, trainer, module, stage) -> None:
        self.wait()

    def save(self, module: TrainingModule) -> None:
        """Write a checkpoint of the present state, at once or in the background."""
        self.wait()
        self.saved_at = time.monotonic()
        snapshot = take_snapshot(module)
        if snapshot is None:  # of another process
            return
        size = snapshot.bytes
        if available_bytes() > MARGIN * size:
            # A thread that has run a tensor operation owns OpenMP threads, and while it lives all of them outnumber the
            # cores, so that those of training sleep between operations: 1.8 times slower. It ends with its file.
            pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self.under_way = pool.submit(self._write, snapshot.copied())
            pool.shutdown(wait=False)
            return
        if not self.told_blocking:
            print(f"no room in memory for a copy of {size / GIB:.1f} GiB: training waits while it saves", flush=True)
            self.told_blocking = True
        self._write(snapshot)

    def wait(self) -> None:
        """Until no checkpoint is being written."""
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self.to.folder, snapshot, self.to.keep, self.to.metadata)
        except OSError as error:
            last = checkpoints_in(self.to.folder)
            kept = f"{last[-1].name} is the last one" if last else "there is none yet"
            reason = error.strerror or str(error)
            line = f"checkpoint of step {snapshot.state['global_step']:,} not written ({reason})"
            print(f"{line}: training goes on, {kept}", file=sys.stderr, flush=True)


def check_disk(to: Checkpointing, module: TrainingModule, max_steps: int) -> None:
    """BadInput if the disk cannot hold the checkpoints that will stay, and the one that is written beside them."""
    stay = -(-max_steps // to.every_n_steps) if to.every_n_steps else 1
    stay = stay if to.keep < 0 else to.keep if to.every_n_minutes else min(to.keep, stay)
    size = size_of(module)
    to.folder.mkdir(parents=True, exist_ok=True)
    present = sum(file.stat().st_size for one in checkpoints_in(to.folder) for file in one.rglob("*") if file.is_file())
    free = shutil.disk_usage(to.folder).free
    needed = (stay + 1) * size - present
    if free < needed:
        raise BadInput(
            f"{to.folder}: {free / GIB:.1f} GiB are free, and {stay} checkpoints of {size / GIB:.1f} GiB, and one more "
            f"while it is written, need {needed / GIB:.1f}; free some, or lower "
            "exp_manager.checkpoint_callback_params.save_top_k"
        )
