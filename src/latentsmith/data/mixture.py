"""Several sets as one run: which sample of which set comes at a position, as a pure function like `order`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from latentsmith.data.order import index_at
from latentsmith.files.errors import BadInput

BLOCK = 1000  # positions in which the shares of the sets are exact


@dataclass(frozen=True)
class Mixture:
    """Samples of sets with these lengths, one after the other in one numbering, drawn in proportion to weights.

    Every BLOCK positions hold each set's share of them (the largest remainders rounded up), in a shuffled order;
    within its own positions each set is a keyed bijection, epoch by epoch, as if it were alone. Raises BadInput for
    weights that are not one positive number for each set, or a share under 1 in BLOCK.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.lengths) or min(self.weights) <= 0:
            raise BadInput(f"weights {list(self.weights)} for {len(self.lengths)} sets: give each one number above 0")
        if 0 in self.slots:
            raise BadInput(f"weights {list(self.weights)}: a set with less than 1 of {BLOCK} samples; raise its weight")

    @property
    def slots(self) -> tuple[int, ...]:
        """Positions of each set among BLOCK."""
        return shares(self.weights, BLOCK)

    def __call__(self, position: int) -> int:
        """The sample's number, over all sets, at `position` of the run."""
        block, place = divmod(position, BLOCK)
        slot = index_at(self.seed ^ 0x51ED, block * BLOCK + place, BLOCK)
        ends = list(accumulate(self.slots))
        number = next(number for number, end in enumerate(ends) if slot < end)
        own = block * self.slots[number] + slot - (ends[number] - self.slots[number])
        first = sum(self.lengths[:number])
        return first + index_at(self.seed + 7919 * number, own, self.lengths[number])


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` split in proportion to weights into whole numbers, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for number in by_remainder[: total - sum(whole)]:
        whole[number] += 1
    return tuple(whole)
