"""Sets mixed by weight: exact shares, every sample in its turn, a pure function of the position."""

import itertools
from collections import Counter

import pytest

from latentsmith.data.shuffle import INTERLEAVE_BLOCK as BLOCK
from latentsmith.data.shuffle import Mixture, WeightedInterleave
from latentsmith.files.errors import BadInput

WEIGHTS = [(1.0, 1.0), (3.0, 1.0), (0.2, 0.5, 0.9), (1e-6, 5.0, 0.0, 2.0), tuple(range(1, 40))]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 1, 10**9])
def test_turns_are_in_proportion_and_each_comes_once(weights, start):
    turns, had = WeightedInterleave(weights, seed=3), {}
    for position in range(start, start + 3000):
        number, own = turns.unshuffled(position)
        assert own == had.get(number, own - 1) + 1  # none is left out and none comes twice, however far the run is
        assert abs(own + 1 - (position + 1) * turns.rates[number] / turns.total) <= len(weights) / 2
        had[number] = own
    blocks = range(start // BLOCK + 1, start // BLOCK + 20)
    inside = [sorted(turns(block * BLOCK + i) for i in range(BLOCK)) for block in blocks]
    assert inside == [sorted(turns.unshuffled(block * BLOCK + i) for i in range(BLOCK)) for block in blocks]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.5)])
def test_each_block_holds_the_shares_and_each_set_goes_through_all_its_samples(weights):
    lengths = (700, 90)
    mixture = Mixture(lengths, weights, seed=4)
    drawn = [mixture(position) for position in range(50 * BLOCK)]
    for block in range(50):
        inside = drawn[block * BLOCK : (block + 1) * BLOCK]
        assert sum(index < 700 for index in inside) == pytest.approx(BLOCK * weights[0] / sum(weights), abs=1)
    for low, high in ((0, 700), (700, 790)):
        own = [index for index in drawn if low <= index < high]
        for epoch in range(len(own) // (high - low)):
            part = own[epoch * (high - low) : (epoch + 1) * (high - low)]
            # an epoch's end may fall inside a block, whose positions come in a shuffled order
            assert len(set(part)) >= (high - low) * 0.5
        counts = Counter(own)
        assert max(counts.values()) - min(counts.values()) <= 2 and len(counts) == high - low


@pytest.mark.parametrize(
    "weights",
    [[39] + [1] * 39, [199] + [1] * 199, [1] * 40, [10] * 20 + [1] * 20, [0, 3] * 20, [0] * 20 + [1] * 20],
)
def test_sets_of_equal_weight_do_not_come_in_clumps(weights):
    turns, half = WeightedInterleave(weights, seed=1), len(weights) // 2
    for first in (range(1), range(half)):
        drawn = [sum(turns(block * BLOCK + i)[0] in first for i in range(BLOCK)) for block in range(10)]
        wanted = BLOCK * sum(weights[i] for i in first) / sum(weights)
        assert drawn == pytest.approx([wanted] * 10, abs=2.5)


def test_the_order_within_a_block_is_shuffled():
    turns = WeightedInterleave((1, 1), seed=0)
    numbers = [turns(position)[0] for position in range(20 * BLOCK)]
    assert numbers != [turns.unshuffled(position)[0] for position in range(20 * BLOCK)]
    same = sum(a == b for a, b in itertools.pairwise(numbers)) / len(numbers)
    assert 0.4 < same < 0.6


def test_seeds_differ_and_positions_do_not_depend_on_each_other():
    first, other = Mixture((40, 30), (1, 2), seed=1), Mixture((40, 30), (1, 2), seed=2)
    positions = range(2000)
    forward = [first(p) for p in positions]
    assert forward == [first(p) for p in reversed(positions)][::-1]
    assert sum(a == b for a, b in zip(forward, (other(p) for p in positions), strict=True)) < 200


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1)])
def test_weights_that_cannot_be(weights):
    with pytest.raises(BadInput):
        Mixture((10, 10), weights, seed=0)
