"""Aspect-ratio buckets: images keep their shape, nearly, and each optimizer step is of one size.

Which samples a step has is a pure function of (seed, step), like the order of `shuffle.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from latentsmith.files.errors import BadInput

from .shuffle import WeightedInterleave, shuffled_index

LEFT_OUT = 255  # the bucket of samples that a run passes over


@dataclass(frozen=True)
class Buckets:
    """Sizes (height, width) of about `resolution` squared pixels, sides multiples of `step`, and no side more than
    `max_aspect` times the other. BadInput for numbers that leave no size, or more than 254 of them."""

    resolution: int
    step: int = 64
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        what = f"aspect_buckets of resolution {self.resolution}, step {self.step}, max_aspect {self.max_aspect}"
        if not self.sizes:
            raise BadInput(f"{what}: there is no such size; resolution is at least one step, max_aspect at least 1")
        if len(self.sizes) > LEFT_OUT:
            raise BadInput(f"{what}: {len(self.sizes)} sizes, more than {LEFT_OUT}; take a larger step")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return (height, width) by number, the widest first: for every width the greatest height that fits."""
        return _sizes(self.resolution, self.step, self.max_aspect)

    def number_of(self, height: int, width: int) -> int:
        """Return the bucket whose aspect is nearest to that of an image, in proportion."""
        return int(self.numbers_of(np.array([[height, width]]))[0])

    def numbers_of(self, sizes: np.ndarray) -> np.ndarray:
        """Return (samples,) uint8, the same of the rows of `sizes`, (samples, 2)."""
        aspects = np.log([height / width for height, width in self.sizes])
        borders = (aspects[:-1] + aspects[1:]) / 2
        found: np.ndarray = np.searchsorted(borders, np.log(sizes[:, 0] / sizes[:, 1]))
        return found.astype(np.uint8)


@lru_cache
def _sizes(resolution: int, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    if step < 1 or max_aspect < 1 or resolution < step:
        return ()
    found = set()
    for side in range(step, int(resolution * max_aspect) + step, step):
        other = resolution * resolution // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size[0])))


class BucketOrder:
    """position -> index of a sample, with every `batch` positions from one bucket.

    numbers: (samples,) uint8, the bucket of each sample, LEFT_OUT for none. Within its own positions each bucket is a
    keyed bijection, epoch by epoch, as if it were alone. Over an epoch of the run each has as many steps as its samples
    fill; the rest is carried over to its next epoch, so that none is dropped and none comes more often. Four bytes
    per sample are held. Raises BadInput if every sample is left out.
    """

    def __init__(self, numbers: np.ndarray, seed: int, batch: int):
        self.seed, self.batch = seed, batch
        self.counts = _counts(numbers, int(numbers[numbers != LEFT_OUT].max(initial=0)) + 1)
        by_bucket = np.argsort(numbers, kind="stable").astype(np.uint32)  # those left out come last
        self.samples = np.split(by_bucket, np.cumsum(self.counts))[:-1]  # of each bucket, in order
        self._latest = (-1, 0, 0)  # a step, its bucket and number: the positions of one step come together
        if not sum(self.counts):
            raise BadInput("no sample is left: model.data.train.filterings leaves all of them out")

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, position: int) -> int:
        step, offset = divmod(position, self.batch)
        if self._latest[0] != step:
            self._latest = (step, *self.step_of(step))
        _, bucket, number = self._latest
        return int(self.samples[bucket][self._within(bucket, number * self.batch + offset)])

    def step_of(self, step: int) -> tuple[int, int]:
        """Return the bucket of an optimizer step of the run, and which of the bucket's own steps it is."""
        epoch = self._epoch_of(step)
        before, after = self._steps_by(epoch), self._steps_by(epoch + 1)
        length, first = sum(after) - sum(before), sum(before)
        slot = shuffled_index(self.seed ^ 0xB0C4, epoch * length + step - first, length)
        for bucket, (done, until) in enumerate(zip(before, after, strict=True)):
            if slot < until - done:
                return bucket, done + slot
            slot -= until - done
        raise AssertionError(step)

    def _within(self, bucket: int, own: int) -> int:
        """Return which sample of a bucket comes at the bucket's own position."""
        return shuffled_index(self.seed + 7919 * (bucket + 1), own, self.counts[bucket])

    def _steps_by(self, epoch: int) -> list[int]:
        """Return the whole steps that each bucket fills in so many epochs."""
        return [epoch * count // self.batch for count in self.counts]

    def _epoch_of(self, step: int) -> int:
        """Return the epoch that step lies in: the last before which no more than `step` steps are done."""
        low = step * self.batch // len(self)
        high = (step + len(self.counts) + 1) * self.batch // len(self) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._steps_by(middle)) <= step else (low, middle)
        return low


class MixedBuckets(BucketOrder):
    """`BucketOrder` over several sets, one after the other in `numbers`, drawn in proportion to weights.

    lengths, weights: of the sets, as of `Mixture`. Each set's share is that of its samples which are not left out, and
    within it they are alike: a bucket's share of the steps, and a set's share of a bucket, are weight times samples.
    Within each bucket every set is a keyed bijection, epoch by epoch. BadInput if nothing is left of a set.
    """

    def __init__(self, numbers: np.ndarray, seed: int, batch: int, lengths: Sequence[int], weights: Sequence[float]):
        super().__init__(numbers, seed, batch)
        parts = np.split(numbers, np.cumsum(lengths)[:-1])
        held = np.array([_counts(part, len(self.counts)) for part in parts])
        if not (kept := held.sum(axis=1)).all():
            raise BadInput(f"nothing is left of set {int(kept.argmin()) + 1} by filterings; take it off the list")
        self.held: list[list[int]] = held.tolist()  # by set and bucket
        self.before: list[list[int]] = (np.cumsum(held, axis=0) - held).tolist()
        share = np.asarray(weights)[:, None] * held / kept[:, None]
        self.steps = WeightedInterleave(share.sum(axis=0).tolist(), seed ^ 0xB0C4)
        self.sets = [
            WeightedInterleave(column, seed + 104729 * bucket) for bucket, column in enumerate(share.T.tolist())
        ]

    def step_of(self, step: int) -> tuple[int, int]:
        return self.steps(step)

    def _within(self, bucket: int, own: int) -> int:
        number, own = self.sets[bucket](own)
        key = self.seed + 7919 * (bucket + 1) + 15485863 * number
        return self.before[number][bucket] + shuffled_index(key, own, self.held[number][bucket])


def _counts(numbers: np.ndarray, buckets: int) -> list[int]:
    """Return the samples of each bucket."""
    return [int(count) for count in np.bincount(numbers, minlength=LEFT_OUT + 1)[:buckets]]


def listing(sizes: Sequence[tuple[int, int]], counts: Sequence[int], batch: int) -> list[str]:
    """Return a line on the buckets that have samples, and one on those too small for a step of `batch`."""
    filled = [(size, count) for size, count in zip(sizes, counts, strict=False) if count]
    named = ", ".join(f"{height}x{width}: {count:,}" for (height, width), count in filled)
    lines = [f"{len(filled)} aspect buckets (height x width: samples): {named}"]
    if small := [f"{height}x{width}" for (height, width), count in filled if count < batch]:
        lines.append(f"buckets with fewer samples than a step of {batch}, which repeats them: {', '.join(small)}")
    return lines
