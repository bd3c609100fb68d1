"""Batches of a run: position -> sample, micro batches of one process, and the worker processes that read them."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from latentsmith.files.errors import BadInput

from .shuffle import DROPOUT, sample_seed, shuffled_index

PREFETCH = 4  # micro batches that each worker reads ahead
JOIN_SECONDS = 5  # for a worker that was killed; one that waits for a dead disk cannot end
Shape = tuple[int, int, int]  # (channels, height, width)
Record = dict[str, Any]
Positions = Sequence[int]
Reader = Callable[[Sequence[int], Positions], Record]  # (indices, positions) -> the samples, stacked


@dataclass(frozen=True)
class RunSamples:
    """The run as a sequence: a list of positions -> the batch of the samples there.

    read(indices, positions): tensors and lists of these samples of the set; crops depend on the positions. Where a set
    has several sizes the batch has a `latent_shape`, which goes to `draw`.
    draw(positions, latent_shape): the tensors that training draws for the positions (noise, timesteps).
    length: samples in the set; each comes once in `length` positions, in an order that changes every epoch.
    order: another rule, position -> index.
    A batch has what both return, its `positions`, and one `dropout_seed`.
    """

    read: Reader
    draw: Callable[[Positions, Shape | None], Mapping[str, torch.Tensor]]
    length: int
    seed: int
    order: Callable[[int], int] | None = None

    def __getitem__(self, positions: Positions) -> Record:
        batch = self.read([self.index(position) for position in positions], positions)
        latent_shape = batch.pop("latent_shape", None)
        return {
            **batch,
            **self.draw(positions, latent_shape),
            "dropout_seed": sample_seed(self.seed, positions[0], DROPOUT),
            "positions": positions,
        }

    def index(self, position: int) -> int:
        """Return the index in the set of the sample at a position."""
        return self.order(position) if self.order else shuffled_index(self.seed, position, self.length)


@dataclass(frozen=True)
class RunPositions:
    """Yield the positions of each micro batch of one process, from `start` on, without end.

    start: the run's consumed_samples, a multiple of global_batch; the loader needs no other state.
    global_batch: samples of one optimizer step over all processes and micro batches.
    """

    start: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start
        share = self.global_batch // self.processes
        while True:
            mine = range(first + self.rank * share, first + (self.rank + 1) * share)
            for at in range(0, share, self.micro_batch):
                yield list(mine[at : at + self.micro_batch])
            first += self.global_batch


def run_loader(samples: RunSamples, positions: RunPositions, *, num_workers: int = 0) -> Iterator[Record]:
    """Yield the batches at `positions`; the number of workers changes nothing but speed."""
    return read_ahead(samples.__getitem__, positions, num_workers=num_workers, pin_memory=torch.cuda.is_available())


def read_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield `read(item)` for each item in order, read ahead by worker processes if there are some."""
    loader: DataLoader[Any] = DataLoader(
        _Reading(read),
        batch_size=None,  # what is read is a whole batch already
        sampler=items,
        collate_fn=_unchanged,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if num_workers else None,
    )
    for result in loader:
        if isinstance(result, BadInput):
            raise result
        yield result


@dataclass(frozen=True)
class _Reading(Dataset[Any]):
    """Call `read` in a worker. A BadInput is returned: torch would raise it with the worker's traceback as message."""

    read: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.read(item)
        except BadInput as error:
            return BadInput(str(error))


def to_device(batch: Record, device: torch.device) -> Record:
    """Return the batch with its tensors on a device; copies from pinned memory to a GPU do not wait."""
    asynchronous = device.type == "cuda"
    moved = {
        name: value.to(device, non_blocking=asynchronous) for name, value in batch.items() if torch.is_tensor(value)
    }
    return {**batch, **moved}


def ignore_signals(worker: int = 0) -> None:
    """Make a worker ignore signals, which schedulers send to the whole process group.

    The process that trains ends its workers itself, after its checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def no_worker_left() -> Iterator[None]:
    """Kill the workers started inside that are still there at the end.

    A stuck worker would never end by itself, since it ignores signals, and the interpreter would wait for it at exit.
    """
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        left = [child for child in multiprocessing.active_children() if child.daemon and child not in before]
        for child in left:
            with suppress(RuntimeError):  # torch raises it for a dead worker, in place of the error that ended all
                child.kill()
        for child in left:
            with suppress(RuntimeError):
                child.join(JOIN_SECONDS)


def collated(read: Callable[[int, int], Record]) -> Reader:
    """Return a Reader that stacks what `read(index, position)` returns for single samples."""
    return lambda indices, positions: collate([read(*pair) for pair in zip(indices, positions, strict=True)])


def collate(records: Sequence[Record]) -> Record:
    """Return records of equal names as one: tensors and arrays stacked to a tensor, anything else in a list."""
    return {name: _stacked([record[name] for record in records]) for name in records[0]}


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return torch.from_numpy(np.stack(values))
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def _unchanged(batch: Any) -> Any:
    return batch
