"""Act before, between and after the steps of a training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..loop import Step, Training


class Hook:
    """Base class of hooks. Each method does nothing unless it is overridden, and none depends on other hooks."""

    def on_start(self, training: Training) -> None:
        """Prepare before the first step, with the state that the training starts or resumes from."""

    def after_step(self, training: Training, step: Step) -> None:
        """Act after every optimizer step, whose number is training.state.global_step."""

    def on_end(self, training: Training) -> None:
        """Finish after the last step, also where a signal or a time limit ended the training, but not after errors."""

    def close(self) -> None:
        """Release what is held, whatever ended the training."""


@contextmanager
def log_os_errors(what: str) -> Iterator[None]:
    """Log an OSError (a full disk) from an optional output, and continue training."""
    try:
        yield
    except OSError as error:
        print(f"{what} not written ({error.strerror or error}): training goes on", file=sys.stderr, flush=True)


@contextmanager
def evaluating(objective: nn.Module) -> Iterator[None]:
    """Switch gradients and dropout off inside the context."""
    training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        objective.train(training)
