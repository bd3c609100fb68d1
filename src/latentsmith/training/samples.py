"""Batches of a run: the samples at its positions, with what training draws for them."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from latentsmith.data.shuffle import sample_seed, shuffled_index

from .random_draws import DROPOUT, Shape

# What is read at a time where no worker reads: a step leaves nothing of this code in the processor's caches.
AHEAD, SAMPLES_AHEAD = 8, 128  # batches, but no more than so many samples
Record = dict[str, Any]
Positions = Sequence[int]
Reader = Callable[[Sequence[int], Positions], Record]


@dataclass(frozen=True)
class RunSamples(Dataset):
    """The run as a sequence: positions -> what `read` makes of the samples there and what `draw` adds, stacked, with
    `positions` themselves and `dropout_seed`, one for all of them.

    read(indices, positions): tensors and lists of these samples of the set, whose crops may depend on the positions;
    their common `latent_shape`, where a set has several, goes to `draw(positions, latent_shape)`.
    length: samples in the set; each is seen once in `length` positions, in an order that changes every epoch. order:
    another rule, position -> index.
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
        """Which sample of the set comes at a position."""
        return self.order(position) if self.order else shuffled_index(self.seed, position, self.length)


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


@dataclass(frozen=True)
class Several(Sampler, Dataset):
    """Several batches at a time: as a sampler their positions, as a data set what is read of them."""

    samples: RunSamples
    positions: RunPositions

    def __iter__(self) -> Iterator[list[list[int]]]:
        positions, at_once = iter(self.positions), min(AHEAD, max(1, SAMPLES_AHEAD // self.positions.micro_batch))
        while True:
            yield list(islice(positions, at_once))

    def __getitem__(self, several: list[list[int]]) -> list[Record]:
        return [self.samples[positions] for positions in several]


@dataclass(frozen=True)
class OneByOne:
    """The batches of a loader that gives several at a time."""

    loader: DataLoader

    def __iter__(self) -> Iterator[Record]:
        for several in self.loader:
            yield from several


def run_loader(samples: RunSamples, positions: RunPositions, *, num_workers: int = 0) -> DataLoader | OneByOne:
    """Batches of a run; the number of workers changes nothing but speed."""
    several = Several(samples, positions)
    loader: DataLoader = DataLoader(
        samples if num_workers else several,
        batch_size=None,  # a sample of this loader is a batch, or several: it is read and drawn as one
        sampler=positions if num_workers else several,
        collate_fn=as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_training,
        persistent_workers=num_workers > 0,  # of those Lightning ends the workers however a training ends
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
    )
    return loader if num_workers else OneByOne(loader)


def as_it_is(read: Any) -> Any:
    return read


def on_device(batch: Record, device: torch.device) -> Record:
    """The batch with its tensors on a device; copies from pinned memory to a GPU do not wait."""
    at_once = device.type == "cuda"
    moved = {name: value.to(device, non_blocking=at_once) for name, value in batch.items() if torch.is_tensor(value)}
    return {**batch, **moved}


def leave_signals_to_training(worker: int) -> None:
    """A scheduler signals the whole group; the process that trains ends its workers itself, after its checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def one_by_one(read: Callable[[int, int], Record]) -> Reader:
    """The reader of batches that collates what `read(index, position)` makes of single samples."""
    return lambda indices, positions: collate([read(*one) for one in zip(indices, positions, strict=True)])


def collate(records: Sequence[Record]) -> Record:
    """Records of equal names as one: tensors and arrays stacked, anything else in a list."""
    return {name: _gathered([record[name] for record in records]) for name in records[0]}


def _gathered(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
