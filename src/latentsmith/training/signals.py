"""Stopping at a step's end when a signal asks for it, with a checkpoint, so that nothing is lost."""

import signal
import threading
from typing import Any

import lightning as L
import torch

from latentsmith.files.errors import Stopped

from .module import StepCallback

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}
AGAIN = 75  # a temporary failure: start it again
STEPS_BETWEEN_LOOKS = 4  # of several processes on GPUs, which have to wait for one another to agree


class StopOnSignal(StepCallback):
    """Ends the training after the step in which SIGINT, SIGTERM or SIGUSR1 came, to whichever process; a second SIGINT
    ends it at once. `raise_if_stopped` then says so, on every process; the last checkpoint is that of any end.

    As a context it listens: from before Lightning starts workers to after the last checkpoint.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.step = 0

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_train_start(self, trainer, module) -> None:
        if self.before:  # Lightning has put its own in their place
            for number in CODES:
                signal.signal(number, self._note)

    def on_step_end(self, trainer: L.Trainer, module) -> None:
        self.step = module.progress.global_step
        if trainer.world_size > 1:
            if module.device.type != "cpu" and self.step % STEPS_BETWEEN_LOOKS:
                return
            newest: Any = trainer.strategy.reduce(
                torch.tensor(int(self.received or 0), device=module.device), reduce_op="max"
            )
            self.received = signal.Signals(int(newest)) if int(newest) else None
        if self.received is not None:
            trainer.should_stop = True

    def raise_if_stopped(self, max_steps: int) -> None:
        """Stopped, if a signal, or trainer.max_time, ended the training before its last step."""
        if self.step >= max_steps:
            return
        why = f"by {self.received.name}" if self.received else "by trainer.max_time"
        saved = f"stopped at step {self.step:,} of {max_steps:,} {why}, saved"
        raise Stopped(f"{saved}; the same command goes on from there", CODES[self.received] if self.received else AGAIN)
