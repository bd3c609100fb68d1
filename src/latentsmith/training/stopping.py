"""Stopping at a step's end when a signal asks for it, with a checkpoint, so that nothing is lost."""

import signal
import threading
from typing import Any

import lightning as L

from latentsmith.files.errors import Stopped

from .module import StepCallback, TrainingModule

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}


class StopOnSignal(StepCallback):
    """Ends the training after the step in which SIGINT, SIGTERM or SIGUSR1 came, to whichever process; a second SIGINT
    ends it at once. `raise_if_stopped` then says so; the last checkpoint is that of any training's end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in CODES}

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_step_end(self, trainer, module) -> None:
        self.step = module.progress.global_step
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def raise_if_stopped(self, max_steps: int) -> None:
        """Stopped, if a signal ended the training before its last step."""
        if self.received is not None and self.step < max_steps:
            saved = f"stopped at step {self.step:,} of {max_steps:,} by {self.received.name}, saved"
            raise Stopped(f"{saved}; the same command goes on from there", CODES[self.received])
