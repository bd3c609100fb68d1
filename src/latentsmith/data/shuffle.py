"""Order and randomness as pure functions of (seed, position): nothing is stored, nothing is consumed.

A run's data state is one number, the position of its next sample. The order within an epoch is a keyed bijection on
0..n-1: a Feistel network over the smallest even number of bits that holds n, walked again where it leaves the range
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Own integer arithmetic, so every NumPy agrees.
"""

from functools import lru_cache
from typing import overload

import numpy as np

ROUNDS = 8  # four already pass as random to a bounded observer (Luby & Rackoff 1988); halves as short as ours want more
MIN_BITS = 6  # over 4 bits the orders of five samples are measurably uneven; over 8 the walk back into them is long
SOME = 256  # positions whose indices are computed together, where single ones are asked for
WORD = (1 << 64) - 1


@overload
def shuffled_index(seed: int, position: int, length: int) -> int: ...
@overload
def shuffled_index(seed: int, position: np.ndarray, length: int) -> np.ndarray: ...
def shuffled_index(seed, position, length):
    """Index of the sample at `position` of a run over a set of `length` samples, shuffled anew each epoch.

    position: 0, 1, 2, ... over the whole run and all processes, an int or an array; epoch = position // length.
    Returns an index in 0..length-1, an int or an array of int64 of the same shape. ValueError if length < 1.
    """
    if length < 1:
        raise ValueError(f"a set of {length} samples has no order")
    if np.ndim(position) == 0 and length < SOME:
        epoch, place = divmod(int(position), length)
        return _permuted_one(place, length, _word(seed, epoch))
    if np.ndim(position) == 0:
        return _some_indices(seed, int(position) // SOME, length)[int(position) % SOME]
    positions = np.asarray(position, dtype=np.int64)
    epochs, places = np.divmod(positions.reshape(-1), length)
    indices = np.empty(places.shape, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permuted(places[chosen], length, _word(seed, int(epoch)))
    return indices.reshape(positions.shape)


@lru_cache(maxsize=256)
def _some_indices(seed: int, block: int, length: int) -> list[int]:
    """The indices at SOME positions: what asks for one mostly goes on to ask for the next."""
    return shuffled_index(seed, np.arange(block * SOME, (block + 1) * SOME), length).tolist()


def permuted(places: np.ndarray, length: int, key: int) -> np.ndarray:
    """Where the bijection named by `key` sends each of `places`, all within 0..length-1."""
    half_bits = _half_bits(length)
    keys = _round_keys(key)
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= length).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def sample_seed(seed: int, position: int, stream: int = 0) -> int:
    """A 64-bit seed for the sample at `position` of the run; `stream` tells independent uses of one position apart."""
    return _some_seeds(seed, position // SOME, stream)[position % SOME]


@lru_cache(maxsize=64)
def _some_seeds(seed: int, block: int, stream: int) -> list[int]:
    """Seeds of SOME positions, by what NumPy's SeedSequence makes of [seed, position, stream] (M. E. O'Neill's
    seed_seq_fe128), for all of them at once."""
    positions = np.arange(block * SOME, (block + 1) * SOME, dtype=np.uint64)
    parts = [positions.astype(np.uint32)] + ([(positions >> np.uint64(32)).astype(np.uint32)] if block >> 24 else [])
    entropy = [*_words(seed), *parts, *_words(stream)]
    entropy += [*_words(0)] * (4 - len(entropy))
    factor = 0x43B0D7E5

    def hashed(value):
        nonlocal factor
        value, factor = value ^ np.uint32(factor), factor * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(factor)
        return value ^ (value >> np.uint32(16))

    def mixed(a, b):
        value = a * np.uint32(0xCA01F9DD) - b * np.uint32(0x4973F715)
        return value ^ (value >> np.uint32(16))

    pool = [hashed(word) for word in entropy[:4]]
    for i in range(4):
        for j in (j for j in range(4) if j != i):
            pool[j] = mixed(pool[j], hashed(pool[i]))
    for word in entropy[4:]:
        pool = [mixed(one, hashed(word)) for one in pool]
    halves, factor = [], 0x8B51F9DD
    for one in pool[:2]:
        value, factor = one ^ np.uint32(factor), factor * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(factor)
        halves.append((value ^ (value >> np.uint32(16))).astype(np.uint64))
    return (halves[0] | halves[1] << np.uint64(32)).tolist()


def _words(number: int) -> list[np.ndarray]:
    """A number in words of 32 bits, the lowest first, each an array of one. ValueError for a negative one."""
    if number < 0:
        raise ValueError(f"{number} is no seed: it has to be 0 or more")
    count = max(1, (number.bit_length() + 31) // 32)
    return [np.array([number >> (32 * i) & 0xFFFFFFFF], np.uint32) for i in range(count)]


def integer_below(bound: int, seed: int, stream: int = 0) -> int:
    """An integer in 0..bound-1, uniform (to bound / 2**64), from a 64-bit seed; `stream` as in `sample_seed`."""
    return (_word(seed, stream) * bound) >> 64


def _permuted_one(place: int, length: int, key: int) -> int:
    """`permuted` of one place: in Python's integers 20 times as fast as in arrays of one."""
    half_bits, keys = _half_bits(length), _round_keys(key)
    mask, kept = (1 << half_bits) - 1, 64 - half_bits
    value = place
    while True:
        left, right = value >> half_bits, value & mask
        for one in keys:
            left, right = right, left ^ (_mix_int(right ^ one) >> kept)
        value = (left << half_bits) | right
        if value < length:
            return value


def _half_bits(length: int) -> int:
    return (max(MIN_BITS, (length - 1).bit_length()) + 1) // 2


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_word(key, number) for number in range(ROUNDS))


def _feistel(values: np.ndarray, half_bits: int, keys: tuple[int, ...]) -> np.ndarray:
    """A permutation of 0..2**(2 * half_bits)-1, applied to an array of uint64."""
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) >> np.uint64(64 - half_bits))
    return (left << shift) | right


def _mix(words: np.ndarray) -> np.ndarray:
    """Spread every bit of 64-bit words over all 64 (the finaliser of SplitMix64: Steele, Lea & Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _word(seed: int, stream: int) -> int:
    """The 64-bit word of number `stream` in the SplitMix64 sequence that starts at a mixed `seed`."""
    state = _mix_int((seed & WORD) ^ 0x5851F42D4C957F2D)
    return _mix_int((state + (stream + 1) * 0x9E3779B97F4A7C15) & WORD)


def _mix_int(word: int) -> int:
    """`_mix` of one Python integer below 2**64."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)
