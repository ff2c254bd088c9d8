import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.counter_rng import (
    RandomStream,
    permutation,
    random_below,
    random_bits,
    random_unit,
)

WORD = 2**64
keys = st.lists(st.integers(0, WORD - 1), min_size=1, max_size=5)

ROOT = Path(__file__).parents[4]


def by_hand(*given_keys):
    """The same numbers with Python's own integers; datasets and runs on disk depend on them."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    state = 0
    for key in given_keys:
        state = mix(
            (state + 0x9E3779B97F4A7C15) % WORD
            ^ mix((key + 0x9E3779B97F4A7C15) % WORD)
        )
    return state


def even(counts):
    """True where counts look like draws from equal chances: χ² within five standard deviations of its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return abs(
        ((counts - expected) ** 2 / expected).sum() - freedom
    ) < 5 * np.sqrt(2 * freedom)


@given(keys)
def test_bits_are_what_python_integers_give(given_keys):
    assert int(random_bits(*(np.uint64(key) for key in given_keys))) == by_hand(
        *given_keys
    )


def test_arrays_of_keys_broadcast_to_the_draws_of_each():
    drawn = random_bits(7, np.arange(3)[:, None], np.array([[2, 9]]))
    assert drawn.dtype == np.uint64 and drawn.shape == (3, 2)
    assert [[int(value) for value in row] for row in drawn] == [
        [by_hand(7, a, b) for b in (2, 9)] for a in range(3)
    ]


def test_order_and_number_of_keys_matter():
    draws = [
        random_bits(*given_keys)
        for given_keys in (
            (1, 2),
            (2, 1),
            (1,),
            (2,),
            (0, 1, 2),
            (1, 2, 0),
            (3, 0),
        )
    ]
    assert len({int(draw) for draw in draws}) == len(draws)


def test_negative_keys_are_keys():
    assert random_bits(3, np.array([-1]))[0] == by_hand(3, WORD - 1)


def test_neighbouring_keys_share_nothing():
    """Flipping the lowest bit of any key flips each output bit half of the time."""
    base = np.arange(0, 8192, 2)
    for place in range(3):
        given_keys, flipped = [5, 5, 5], [5, 5, 5]
        given_keys[place], flipped[place] = base, base + 1
        difference = random_bits(*given_keys) ^ random_bits(*flipped)
        ones = (
            (difference[:, None] >> np.arange(64, dtype=np.uint64))
            & np.uint64(1)
        ).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(base))


@given(st.integers(0, WORD - 1), st.integers(1, 2**31 - 1))
def test_below_scales_the_high_half(bits, bound):
    drawn = random_below(np.uint64(bits), bound)
    assert drawn == (bits >> 32) * bound >> 32
    assert 0 <= drawn < bound


def test_below_takes_a_bound_for_each():
    drawn = random_below(
        np.full(4, np.uint64(WORD - 1)), np.array([1, 2, 1000, 2**31 - 1])
    )
    assert drawn.dtype == np.int64 and drawn.tolist() == [0, 1, 999, 2**31 - 2]


@pytest.mark.parametrize("bound", [2, 7, 72, 1000])
def test_below_is_even(bound):
    assert even(
        np.bincount(
            random_below(random_bits(11, bound, np.arange(200 * bound)), bound),
            minlength=bound,
        )
    )


def test_unit_is_even_and_never_one():
    assert (
        random_unit(np.uint64(WORD - 1)) < 1 and random_unit(np.uint64(0)) == 0
    )
    assert even(
        np.histogram(
            random_unit(random_bits(1, np.arange(20000))), bins=50, range=(0, 1)
        )[0]
    )


@given(st.integers(0, 300), keys)
def test_a_permutation_has_everything_once(length, given_keys):
    order = permutation(length, *(np.uint64(key) for key in given_keys))
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(
        range(length)
    )


def test_every_order_is_as_likely():
    orders = {order: 0 for order in itertools.permutations(range(4))}
    for key in range(4800):
        orders[tuple(permutation(4, 3, key).tolist())] += 1
    assert even(np.array(list(orders.values())))


# A log's own seed, and draws that are numbered there.
_SEEDED_APART = "trainer/data/synthetic.py"


def streams_of_calls():
    """For each call that draws from a run's seed: where it stands, and the key after the seed."""
    for file in sorted((ROOT / "trainer").rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name in (_SEEDED_APART, "trainer/data/counter_rng.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Name
            ):
                continue
            key_of_stream = {"random_bits": 1, "permutation": 2}.get(
                node.func.id
            )
            if key_of_stream is not None:
                yield (
                    f"{name}:{node.lineno}",
                    ast.unparse(node.args[key_of_stream]),
                )


def test_each_use_of_a_seed_has_a_stream_of_its_own():
    uses = list(streams_of_calls())
    assert len(uses) >= len(RandomStream)
    files_of = {}
    for place, stream in uses:
        assert stream.startswith("RandomStream."), (
            f"{place} draws without a stream: {stream}"
        )
        files_of.setdefault(stream, set()).add(place.partition(":")[0])
    assert files_of.keys() == {
        f"RandomStream.{stream.name}" for stream in RandomStream
    }
    assert all(len(files) == 1 for files in files_of.values()), files_of
    assert len({int(stream) for stream in RandomStream}) == len(RandomStream)
