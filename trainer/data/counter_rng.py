"""Random numbers from counters: the same (seed, epoch, user, …) gives the same draw on any rank, in any order.

The mixer is splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014),
applied once per key. It is vectorised over NumPy arrays, holds no state, and has nothing to do with cryptography.
"""

from enum import IntEnum, unique

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


@unique
class RandomStream(IntEnum):
    """Every use of a run's seed. It is the key after the seed, so that no two uses share bits.

    A number that has been used keeps its meaning: results of the same seed depend on it.
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


def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY_2
    return z ^ (z >> np.uint64(31))


def random_bits(*keys):
    """64 random bits for each combination of keys.

    keys: integers or integer arrays that broadcast together; their order matters.
    Returns a uint64 array (or scalar array) of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for key in keys:
            key = np.asarray(key).astype(np.uint64)
            state = _mix((state + _GOLDEN) ^ _mix(key + _GOLDEN))
    return state


def random_below(bits, bound):
    """Maps random bits to integers in [0, bound): the high 32 bits times the bound, shifted.

    bits: uint64 array; bound: positive integers below 2**31 that broadcast with it. Returns int64.
    The bias is below bound / 2**32.
    """
    with np.errstate(over="ignore"):
        product = (bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


def random_unit(bits):
    """Maps random bits to float64 in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length, *keys):
    """A permutation of range(length), int64, that depends on the keys alone."""
    return np.argsort(random_bits(*keys, np.arange(length)), kind="stable")
