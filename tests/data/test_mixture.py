"""Sets mixed by weight: exact shares, every sample in its turn, a pure function of the position."""

from collections import Counter

import pytest

from latentsmith.data.mixture import BLOCK, Mixture, shares
from latentsmith.files.errors import BadInput


def test_shares_are_exact_and_whole():
    assert shares((1, 1), 1000) == (500, 500) and shares((2, 1), 1000) == (667, 333)
    assert shares((1, 1, 1), 10) == (4, 3, 3) and sum(shares((0.3, 0.33, 0.37), 1000)) == 1000


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.5)])
def test_each_block_holds_the_shares_and_each_set_goes_through_all_its_samples(weights):
    lengths = (700, 90)
    mixture = Mixture(lengths, weights, seed=4)
    drawn = [mixture(position) for position in range(5 * BLOCK)]
    for block in range(5):
        inside = drawn[block * BLOCK : (block + 1) * BLOCK]
        assert sum(index < 700 for index in inside) == mixture.slots[0]
    for low, high in ((0, 700), (700, 790)):
        own = [index for index in drawn if low <= index < high]
        for epoch in range(len(own) // (high - low)):
            part = own[epoch * (high - low) : (epoch + 1) * (high - low)]
            # an epoch's end may fall inside a block, whose positions come in a shuffled order
            assert len(set(part)) >= (high - low) * 0.5
        counts = Counter(own)
        assert max(counts.values()) - min(counts.values()) <= 2 and len(counts) == high - low


def test_the_sets_are_spread_over_the_block():
    mixture = Mixture((50, 50), (1, 1), seed=0)
    halves = [sum(mixture(p) < 50 for p in range(start, start + 100)) for start in range(0, 1000, 100)]
    assert min(halves) > 25 and max(halves) < 75 and sum(halves) == 500


def test_seeds_differ_and_positions_do_not_depend_on_each_other():
    first, other = Mixture((40, 30), (1, 2), seed=1), Mixture((40, 30), (1, 2), seed=2)
    positions = range(2000)
    forward = [first(p) for p in positions]
    assert forward == [first(p) for p in reversed(positions)][::-1]
    assert sum(a == b for a, b in zip(forward, (other(p) for p in positions), strict=True)) < 200


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, 1e-9)])
def test_weights_that_cannot_be(weights):
    with pytest.raises(BadInput):
        Mixture((10, 10), weights, seed=0)
