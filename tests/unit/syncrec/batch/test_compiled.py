"""Batches that compiled loops build are those that NumPy builds, to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncrec.batch import compiled
from syncrec.batch.build import build_batch, trim
from syncrec.batch.views import map_tensors

pytestmark = pytest.mark.skipif(
    bool(compiled.why_missing()), reason="no compiled loops on this machine"
)

ITEMS = 50  # of a domain
TICKS = st.sampled_from([0, 1, 2, 3, 7, 8, 1000, 65534, 65535])


@st.composite
def histories(draw):
    """(lengths_B, domain_N, items_N, ticks_N, weight_B, domains): some empty, some of one item.

    Users of the real data come with rising ticks; any ticks are taken.
    """
    domains = draw(st.integers(1, 5))
    used = draw(st.lists(st.integers(0, domains - 1), min_size=1, max_size=5))
    lengths = st.sampled_from([0, 1, 1, 2, 3, 5, 9, 30])
    lengths_B = np.array(draw(st.lists(lengths, max_size=7)), np.int64)
    count = int(lengths_B.sum())
    size = {"min_size": count, "max_size": count}
    domain_N = draw(st.lists(st.sampled_from(used), **size))
    domain_N = np.array(domain_N, np.int8)
    place_N = draw(st.lists(st.integers(0, ITEMS - 1), **size))
    items_N = np.array(place_N, np.int32) + ITEMS * domain_N.astype(np.int32)
    ticks_N = np.array(draw(st.lists(TICKS, **size)), np.uint16)
    weight_B = np.ones(len(lengths_B), np.float32)
    weight_B[draw(st.integers(0, len(lengths_B))) :] = 0  # filler users
    return lengths_B, domain_N, items_N, ticks_N, weight_B, domains


@st.composite
def negatives(draw, count, domains):
    """Each target's own, or those that a domain's targets share; domains without any too."""
    rows = st.integers(0, ITEMS * domains - 1)
    if draw(st.booleans()):
        width = draw(st.integers(1, 3))
        drawn = draw(
            st.lists(rows, min_size=count * width, max_size=count * width)
        )
        return np.array(drawn, np.int64).reshape(count, width)
    shared = []
    for _ in range(domains):
        shared.append(np.array(draw(st.lists(rows, max_size=4)), np.int64))
    return shared


def without_kernel(function, *args, **given):
    """function(…) by NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "why_missing", lambda: "not wanted")
        return function(*args, **given)


def widened(batch):
    """The batch as the model gets it (`move`), with everything in it as plain values."""

    def widen(tensor):
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    wide = map_tensors(batch, widen)
    return dataclasses.asdict(wide)


def assert_same(one, other, path="batch"):
    """Both are equal to the bit, in dtype and in shape."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name], f"{path}.{name}")
    elif path.endswith("micro_batches"):
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}.{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert one == other, path


@given(st.data(), histories(), st.sampled_from([1, 2, 3, 4, 9, 12, 64]))
def test_batches_are_those_of_numpy(data, drawn, max_length):
    lengths_B, domain_N, items_N, ticks_N, weight_B, domains = drawn
    everything = (np.arange(len(items_N)), lengths_B, domain_N, max_length)
    kept, lengths_B, domain_N = trim(*everything)
    expected = without_kernel(trim, *everything)
    for one, other in zip((kept, lengths_B, domain_N), expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    arguments = (
        items_N[kept],
        lengths_B,
        domain_N,
        weight_B,
        data.draw(negatives(len(kept), domains)),
        [ITEMS] * domains,
        max_length,
        data.draw(st.sampled_from(["mean", "last"])),
        data.draw(st.sampled_from([None, ticks_N[kept]])),
        data.draw(st.sampled_from([1, 3])),
    )
    batch = build_batch(*arguments)
    assert_same(
        widened(batch), widened(without_kernel(build_batch, *arguments))
    )


@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 5)))
def test_rows_are_listed_as_numpy_lists_them(rows):
    rows = np.array(rows, np.int64)
    distinct, inverse = compiled.list_rows(rows)
    expected, places = np.unique(rows, return_inverse=True)
    assert distinct.tolist() == expected.tolist()
    assert inverse.tolist() == places.tolist()
    assert (distinct.dtype, inverse.dtype) == (torch.int64, torch.int32)


def test_a_row_that_no_table_has_is_refused():
    with pytest.raises(RuntimeError, match="less than 2"):
        compiled.list_rows(np.array([3, -1]))


def test_integers_are_narrow():
    """A loader writes half as much."""
    lengths_B = np.array([2, 0])
    batch = build_batch(
        np.array([3, 4]),
        lengths_B,
        np.array([0, 1]),
        np.ones(2),
        [np.array([1]), np.array([2])],
        [ITEMS, ITEMS],
        4,
    )
    narrow = dataclasses.asdict(batch.single)
    for value in narrow.values():
        if isinstance(value, torch.Tensor):
            assert value.dtype != torch.int64
