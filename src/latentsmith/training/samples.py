"""Batches of a run: the sample at every position, with what training draws for it."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from latentsmith.data.order import index_at, sample_seed

from .draws import DROPOUT, Shape

Record = dict[str, Any]


@dataclass(frozen=True)
class RunSamples(Dataset):
    """The run as a sequence: position -> what `read` makes of the sample there, what `draw` adds, `dropout_seed` and
    `positions`, the position itself.

    read(index, position): tensors and text of one sample of the set, whose crops may depend on the position; its
    `latent_shape`, where samples have several, goes to `draw(position, latent_shape)`.
    length: samples in the set; each is seen once in `length` positions, in an order that changes every epoch. order:
    another rule, position -> index.
    """

    read: Callable[[int, int], Record]
    draw: Callable[[int, Shape | None], Mapping[str, torch.Tensor]]
    length: int
    seed: int
    order: Callable[[int], int] | None = None

    def __getitem__(self, position: int) -> Record:
        index = self.order(position) if self.order else index_at(self.seed, position, self.length)
        dropout_seed = sample_seed(self.seed, position, DROPOUT)
        record = self.read(index, position)
        return {
            **record,
            **self.draw(position, record.pop("latent_shape", None)),
            "dropout_seed": dropout_seed,
            "positions": position,
        }


@dataclass(frozen=True)
class RunPositions(Sampler):
    """Micro batches of positions for one process, from `start` on, without end.

    global_batch: samples of one optimizer step over all processes and micro batches; start divides by it.
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


def run_loader(samples: RunSamples, positions: RunPositions, *, num_workers: int = 0) -> DataLoader:
    """Collated batches of a run; the number of workers changes nothing but speed."""
    return DataLoader(
        samples,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_training,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
    )


def leave_signals_to_training(worker: int) -> None:
    """A scheduler signals the whole group; the process that trains ends its workers itself, after its checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def collate(records: Sequence[Record]) -> Record:
    """Records of equal names as one: tensors and arrays stacked, anything else in a list."""
    return {name: _gathered([record[name] for record in records]) for name in records[0]}


def _gathered(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
