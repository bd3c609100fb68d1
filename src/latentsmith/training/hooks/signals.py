"""Stopping at a step's end when a signal or a time limit asks for it, with a checkpoint, so that nothing is lost."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from latentsmith.files.errors import Stopped

from ..loop import Step, Training
from ..sharding import largest
from . import Hook

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}
TIME_IS_UP = 1000  # beside the numbers of signals
START_AGAIN = 75  # exit code of a temporary failure
STEPS_BETWEEN_CHECKS = 4  # of several processes on GPUs, which have to wait for one another to agree


class StopOnSignal(Hook):
    """Ends a training after the step in which SIGINT, SIGTERM, SIGUSR1 or SIGHUP came, to whichever process.

    A second SIGINT ends it at once. SIGHUP, of a terminal that closes, stays ignored under nohup. max_seconds: ends it
    so long after its start. Listens from the start of a training, before it has workers, until after its last
    checkpoint.
    """

    def __init__(self, max_seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.max_seconds, self.clock = max_seconds, clock
        self.received = 0
        self.previous: dict[int, Any] = {}

    def on_start(self, training: Training) -> None:
        self.started = self.clock()
        if threading.current_thread() is threading.main_thread():
            kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
            self.previous = {number: signal.signal(number, self._note) for number in EXIT_CODES if number not in kept}

    def _note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def after_step(self, training: Training, step: Step) -> None:
        number, last = training.state.global_step, training.plan.max_steps
        if training.fabric.device.type != "cpu" and training.fabric.world_size > 1 and number % STEPS_BETWEEN_CHECKS:
            return
        found = self.received
        if not found and self.max_seconds is not None and self.clock() - self.started >= self.max_seconds:
            found = TIME_IS_UP
        found = largest(training.fabric, found)
        if not found or number >= last:
            return
        reason = "trainer.max_time" if found == TIME_IS_UP else signal.Signals(found).name
        line = f"stopped at step {number:,} of {last:,} by {reason}, saved; the same command goes on from there"
        training.stop(Stopped(line, EXIT_CODES.get(found, START_AGAIN)))

    def close(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
