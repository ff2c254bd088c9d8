"""Random numbers from counters: the same keys give the same draw on any rank, in any order.

Keys are the run's seed, a `RandomStream` and, for example, (epoch, user). This is a counter-based
generator, as Philox and Threefry are.

The mixer is splitmix64's finaliser, applied once per key (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014). It is vectorised over NumPy arrays and holds no state. It
has nothing to do with cryptography.
"""

from enum import IntEnum, unique
from typing import TypeAlias

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1 = np.uint64(30)
_SHIFT_2 = np.uint64(27)
_SHIFT_3 = np.uint64(31)
_HALF = np.uint64(32)  # bits
# Bits of 64 that a float64's mantissa has no room for.
_NOT_IN_FLOAT = np.uint64(11)

Key: TypeAlias = int | np.ndarray


@unique
class RandomStream(IntEnum):
    """The uses of a run's seed: one stream each.

    The stream is the key after the seed, so that no two uses share bits. A number that has been
    used keeps its meaning: results of the same seed depend on it.
    """

    TARGET_NEGATIVES = 1
    SHARED_NEGATIVES = 2
    EVALUATION_CANDIDATES = 3
    POPULARITY_TIES = 4
    SHARD_ORDER = 5
    USER_ORDER = 6
    DROPOUT = 7
    MUTUAL_INFORMATION_SAMPLE = 8
    BOOTSTRAP_WEIGHTS = 9
    POSITION_TIES = 10
    PERSONALIZATION_SAMPLE = 11
    PERSONALIZATION_EXCHANGE = 12
    TIME_TIES = 13
    VALIDATION_SAMPLE = 14


def _mix(state: np.ndarray) -> np.ndarray:
    # In place after the first line: fresh memory for each step would take longer than the step.
    state = state ^ (state >> _SHIFT_1)
    state *= _MULTIPLY_1
    state ^= state >> _SHIFT_2
    state *= _MULTIPLY_2
    state ^= state >> _SHIFT_3
    return state


def random_bits(*keys: Key) -> np.ndarray:
    """64 random bits for each combination of keys.

    keys: integers or integer arrays that broadcast together; their order matters.
    Returns a uint64 array (or scalar array) of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        state: np.ndarray = np.zeros((), np.uint64)
        for key in keys:
            key = np.asarray(key)
            key = key.astype(np.uint64)
            mixed_key = _mix(key + _GOLDEN)
            state = _mix((state + _GOLDEN) ^ mixed_key)
    return state


def random_below(bits: np.ndarray, bound: Key) -> np.ndarray:
    """Maps random bits to integers in [0, bound): the high 32 bits times the bound, shifted.

    bits: uint64. bound: positive integers below 2**31 that broadcast with it. Returns int64.
    The bias is below bound / 2**32.
    """
    bound = np.asarray(bound).astype(np.uint64)
    with np.errstate(over="ignore"):
        product = (bits >> _HALF) * bound
    product = product >> _HALF
    return product.astype(np.int64)


def random_unit(bits: np.ndarray) -> np.ndarray:
    """Maps random bits to float64 in [0, 1)."""
    return (bits >> _NOT_IN_FLOAT).astype(np.float64) * 2.0**-53


def permutation(length: int, *keys: Key) -> np.ndarray:
    """A permutation of range(length), int64, that depends on the keys alone."""
    bits = random_bits(*keys, np.arange(length))
    return np.argsort(bits, kind="stable")
