import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.row_scatter import RowScatter


@given(st.integers(1, 3000))
def test_every_row_has_its_own_place(rows):
    scatter = RowScatter(rows)
    stored = scatter.stored(torch.arange(rows))
    assert stored.dtype == torch.int64 and sorted(stored.tolist()) == list(
        range(rows)
    )
    assert scatter.row(stored).tolist() == list(range(rows))
    assert scatter.row(stored.numpy()).tolist() == list(range(rows))


@given(st.integers(1, 2**31 - 1), st.floats(0, 1, exclude_max=True))
def test_large_tables_find_their_rows_again(rows, share):
    scatter = RowScatter(rows)
    row = torch.tensor([int(share * rows), 0, rows - 1])
    stored = scatter.stored(row)
    assert (
        (stored >= 0) & (stored < rows)
    ).all()  # nothing has left int64 on the way
    assert stored[0] == (int(row[0]) * scatter.step + 1) % rows
    assert scatter.row(stored).tolist() == row.tolist()
    assert scatter.row(stored.numpy()).tolist() == row.tolist()


@pytest.mark.parametrize("rows", [1000, 9001, 65536, 1_000_003, 10_000_000])
@pytest.mark.parametrize("shards", [2, 3, 8, 64])
def test_any_domain_falls_evenly_on_all_shards(rows, shards):
    """Of a contiguous range, each shard gets its part to within half a percent, wherever the range begins."""
    scatter, size = RowScatter(rows), math.ceil(rows / shards)
    for begin in (0, rows // 3, rows - rows // 10):
        for length in (rows // 10, rows // 37):
            shard = scatter.stored(torch.arange(begin, begin + length)) // size
            counts = np.bincount(shard.numpy(), minlength=shards)
            whole = np.minimum(size, rows - size * np.arange(shards)) / rows
            assert (
                np.abs(counts - length * whole) < 6 + 0.005 * length * whole
            ).all()


def test_neighbours_are_stored_far_apart():
    stored = RowScatter(1_000_003).stored(torch.arange(1000)).sort().values
    assert stored.diff().min() > 1_000_003 / 1000 / 4


@pytest.mark.parametrize("rows", [0, -1, 2**31])
def test_impossible_sizes_are_refused(rows):
    with pytest.raises(ValueError, match=f"not {rows}"):
        RowScatter(rows)
