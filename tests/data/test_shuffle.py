import itertools
from collections import Counter

import numpy as np
import pytest

from latentsmith.data.shuffle import integer_below, sample_seed, shuffled_index


def indices(seed, positions, length):
    return np.array([shuffled_index(seed, int(position), length) for position in positions])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_each_epoch_is_a_permutation(length, seed):
    epochs = indices(seed, range(3 * length), length).reshape(3, length)
    for epoch in epochs:
        assert (np.sort(epoch) == np.arange(length)).all()
    if length > 5:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_values_are_fixed_for_good():
    """Recorded: a change here would change the order of every run that is under way."""
    assert indices(0, range(8), 10).tolist() == RECORDED_ORDER
    assert sample_seed(1, 2, 3) == RECORDED_SEED
    assert integer_below(1000, 42, 1) == RECORDED_INTEGER


RECORDED_ORDER = [5, 9, 4, 2, 7, 1, 6, 0]
RECORDED_SEED = 12997252459554536576
RECORDED_INTEGER = 595


def test_all_orders_of_a_small_set_are_equally_likely():
    """Chi-square over the 24 orders of four samples: 23 degrees of freedom, standard deviation 6.8."""
    trials = 2400
    counts = Counter(tuple(shuffled_index(key, position, 4) for position in range(4)) for key in range(trials))
    expected = trials / 24
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(4)))
    assert chi_square < 23 + 4 * 6.8


def test_order_is_uncorrelated_with_position_and_with_the_next_epoch():
    length = 20_000
    first, second = indices(3, range(2 * length), length).reshape(2, length)
    bound = 4 / length**0.5  # four standard deviations of a sample correlation
    for a, b in [(first, np.arange(length)), (first, second), (first[:-1], first[1:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < bound


def test_huge_sets_cost_nothing():
    length = 10**12
    found = [shuffled_index(0, position, length) for position in range(10**12 - 5, 10**12 + 5)]
    assert len(set(found)) == 10 and min(found) >= 0 and max(found) < length


def test_an_empty_set_has_no_order():
    with pytest.raises(ValueError, match="0 samples"):
        shuffled_index(0, 0, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**64 - 1])
def test_sample_seeds_are_numpys(seed):
    for position in (0, 1, 255, 256, 12_345, 2**32 - 1, 2**32, 2**33 + 1, 2**40):
        for stream in (0, 1, 7, 2**32):
            wanted = np.random.SeedSequence([seed, position, stream]).generate_state(1, np.uint64)
            assert sample_seed(seed, position, stream) == wanted[0]
    with pytest.raises(ValueError, match="non-negative"):
        sample_seed(-1, 0)


def test_sample_seeds_differ_in_every_argument():
    seeds = {sample_seed(s, p, k) for s in range(10) for p in range(10) for k in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**64 for seed in seeds)


def test_integer_below_is_uniform():
    counts = Counter(integer_below(10, sample_seed(0, p), 2) for p in range(5000))
    assert set(counts) == set(range(10))
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 9 + 4 * 18**0.5
