"""Order and randomness as pure functions of (seed, position): nothing is stored, nothing is consumed.

A run's data state is one number, the position of its next sample. The order within an epoch is a keyed bijection on
0..n-1: a Feistel network over the smallest even number of bits that holds n, applied again while its result lies
outside the range (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). It uses integer arithmetic of its
own, so that every NumPy version gives the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace

import numpy as np

from latentsmith.files.errors import BadInput

# Random streams of one position: what training adds to its sample (noise, timestep), its transforms, dropout.
DRAWS, CROPS, DROPOUT, CAPTIONS = 1, 2, 3, 4
ROUNDS = 8  # four already pass as random to a bounded observer (Luby & Rackoff 1988); short halves need more
MIN_BITS = 6  # with 4 bits the orders of five samples are measurably uneven; with 8 small sets need many passes
WORD = (1 << 64) - 1
INTERLEAVE_BLOCK = 100  # positions of a WeightedInterleave that are shuffled among themselves
ONE = 1 << 64  # the unit of time of a WeightedInterleave
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def shuffled_index(seed: int, position: int, length: int) -> int:
    """Return the index (0..length-1) of the sample at a position of a run over `length` samples, reshuffled each epoch.

    position: 0, 1, 2, ... over the whole run and all processes; epoch = position // length.
    Raises ValueError if length < 1.
    """
    if length < 1:
        raise ValueError(f"a set of {length} samples has no order")
    epoch, value = divmod(int(position), length)
    half_bits = (max(MIN_BITS, (length - 1).bit_length()) + 1) // 2
    keys = _round_keys(_word(seed, epoch))
    mask, shift = (1 << half_bits) - 1, 64 - half_bits
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> shift)
        value = (left << half_bits) | right
        if value < length:
            return value


def sample_seed(seed: int, position: int, stream: int = 0) -> int:
    """Return a 64-bit seed for the sample at a position of the run; each `stream` gives an independent one.

    Raises ValueError for a negative seed.
    """
    return int(np.random.SeedSequence([seed, position, stream]).generate_state(1, np.uint64)[0])


def integer_below(bound: int, seed: int, stream: int = 0) -> int:
    """Return an integer in 0..bound-1, uniform (to bound / 2**64), from a 64-bit seed; `stream` as in `sample_seed`."""
    return (_word(seed, stream) * bound) >> 64


class WeightedInterleave:
    """Weighted round-robin: map a position to (source number, index of that draw within the source).

    Draw n of source i of k, with share s, is due at time (n + (r + 1/2) / k) / s, where the ranks r = 0..k-1 of
    neighbours are far apart, so that sources of equal weight do not clump. Draws come in the order of their times, but
    each block of INTERLEAVE_BLOCK positions is shuffled.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.rates = [round(weight / (sum(weights) or 1) * 2**32) or int(weight > 0) for weight in weights]
        self.total = sum(self.rates)
        count = len(self.rates)
        spread = sorted(range(count), key=lambda i: i * GOLDEN % ONE)  # multiples of it fill a circle evenly
        self.ranks = sorted(range(count), key=spread.__getitem__)

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and how many draws it has had before."""
        start = position // INTERLEAVE_BLOCK * INTERLEAVE_BLOCK
        return self.unshuffled(start + shuffled_index(self.seed ^ 0x51ED, position, INTERLEAVE_BLOCK))

    def unshuffled(self, position: int) -> tuple[int, int]:
        """Return the same for the order of times. Integers alone, so that no two positions ever have the same draw."""
        parts = 2 * len(self.rates)  # of the time between two draws; rank r comes after 2 * r + 1 of them
        before = max(0, position - len(self.rates))  # at this time at most `position` draws are done
        past = parts * before * ONE // self.total + 1
        sources = zip(self.rates, self.ranks, strict=True)
        done = [((past * rate - 1) // ONE - 2 * rank - 1) // parts + 1 for rate, rank in sources]

        def next_draw(i: int) -> tuple[int, int]:
            return (parts * done[i] + 2 * self.ranks[i] + 1) * ONE // self.rates[i], i

        due = [next_draw(i) for i, rate in enumerate(self.rates) if rate]
        heapify(due)
        for _ in range(position - sum(done) + 1):
            number = due[0][1]
            done[number] += 1
            heapreplace(due, next_draw(number))
        return number, done[number] - 1


@dataclass(frozen=True)
class Mixture:
    """Map a position to a sample of several sets, numbered one after the other, drawn in proportion to weights.

    The sets take turns by `WeightedInterleave`; within its own draws each is shuffled, epoch by epoch, as if it were
    alone. Raises BadInput for weights that are not one positive number for each set.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.lengths) or min(self.weights) <= 0:
            raise BadInput(f"weights {list(self.weights)} for {len(self.lengths)} sets: give each one number above 0")

    @cached_property
    def interleave(self) -> WeightedInterleave:
        return WeightedInterleave(self.weights, self.seed)

    def __call__(self, position: int) -> int:
        number, draw = self.interleave(position)
        first = sum(self.lengths[:number])
        return first + shuffled_index(self.seed + 7919 * number, draw, self.lengths[number])


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_word(key, number) for number in range(ROUNDS))


def _word(seed: int, stream: int) -> int:
    """Return word number `stream` (64 bits) of the SplitMix64 sequence that starts at a mixed `seed`."""
    state = _mix((seed & WORD) ^ 0x5851F42D4C957F2D)
    return _mix((state + (stream + 1) * GOLDEN) & WORD)


def _mix(word: int) -> int:
    """Spread every bit of a 64-bit word over all 64 (the finaliser of SplitMix64: Steele, Lea & Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)
