"""Several sets as one run: which sample of which set comes at a position, as a pure function like `order`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heapreplace

from latentsmith.files.errors import BadInput

from .shuffle import shuffled_index

BLOCK = 100  # positions whose turns are shuffled
ONE = 1 << 64  # turns are timed in parts of this
GOLDEN = 0x9E3779B97F4A7C15  # ONE over the golden ratio


class Turns:
    """Whose turn it is at a position, in proportion to weights: evenly, but that each block of BLOCK is shuffled.

    Turn n of number i of k, with share s, is at time (n + (r + 1/2) / k) / s, where the ranks r = 0..k-1 are far apart
    for neighbours, so that equal ones do not come together; turns are taken in the order of their times.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.rates = [round(weight / (sum(weights) or 1) * 2**32) or int(weight > 0) for weight in weights]
        self.total = sum(self.rates)
        count = len(self.rates)
        spread = sorted(range(count), key=lambda i: i * GOLDEN % ONE)  # multiples of it fill a circle evenly
        self.ranks = sorted(range(count), key=spread.__getitem__)

    def __call__(self, position: int) -> tuple[int, int]:
        """The number of the one at `position`, and how many turns it has had before."""
        start = position // BLOCK * BLOCK
        return self.unshuffled(start + shuffled_index(self.seed ^ 0x51ED, position, BLOCK))

    def unshuffled(self, place: int) -> tuple[int, int]:
        """The same in the order of times. Integers alone, so that no two places ever have the same turn."""
        parts = 2 * len(self.rates)  # of the time between two turns, which rank r takes after 2 * r + 1
        before = max(0, place - len(self.rates))  # by which time no more than `place` turns are over
        past = parts * before * ONE // self.total + 1
        turns = zip(self.rates, self.ranks, strict=True)
        done = [((past * rate - 1) // ONE - 2 * rank - 1) // parts + 1 for rate, rank in turns]

        def next_turn(i: int) -> tuple[int, int]:
            return (parts * done[i] + 2 * self.ranks[i] + 1) * ONE // self.rates[i], i

        coming = [next_turn(i) for i, rate in enumerate(self.rates) if rate]
        heapify(coming)
        for _ in range(place - sum(done) + 1):
            number = coming[0][1]
            done[number] += 1
            heapreplace(coming, next_turn(number))
        return number, done[number] - 1


@dataclass(frozen=True)
class Mixture:
    """Samples of sets with these lengths, one after the other in one numbering, drawn in proportion to weights.

    The sets take `Turns`; within its own positions each is a keyed bijection, epoch by epoch, as if it were alone.
    Raises BadInput for weights that are not one positive number for each set.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.lengths) or min(self.weights) <= 0:
            raise BadInput(f"weights {list(self.weights)} for {len(self.lengths)} sets: give each one number above 0")

    @cached_property
    def turns(self) -> Turns:
        return Turns(self.weights, self.seed)

    def __call__(self, position: int) -> int:
        """The sample's number, over all sets, at `position` of the run."""
        number, own = self.turns(position)
        first = sum(self.lengths[:number])
        return first + shuffled_index(self.seed + 7919 * number, own, self.lengths[number])
