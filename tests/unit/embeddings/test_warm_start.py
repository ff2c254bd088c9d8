"""Rows of a saved table found again at their new places, to the bit, by other numbers of ranks."""

import shutil

import numpy as np
import pytest

from embeddings.checkpoint import ShardCopy
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from embeddings.warm_start import carry_rows
from tests.helpers import carry_worker
from tests.helpers.alone import group_of_one
from tests.helpers.carry_worker import (
    CONFIG,
    DIM,
    FRESH,
    GROUPS,
    NEW,
    OLD,
    mapping,
)
from tests.helpers.rank_processes import run_on_cpu_ranks, start_on_cpu_ranks

pytestmark = pytest.mark.ranks  # they start processes

SAVED, CARRIED = (1, 3), (1, 2, 3, 4)  # four ranks have two copies


def with_ranks(ranks, what, folder, *saved):
    if ranks == 1:
        with group_of_one():
            getattr(carry_worker, what)(folder, *saved)
        return
    run_on_cpu_ranks(ranks, "tests.helpers.carry_worker", what, folder, *saved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carry")
    for ranks in SAVED:
        with_ranks(ranks, "save", folder)
    for ranks in CARRIED:
        with_ranks(
            ranks,
            "carry",
            folder,
            *(folder / f"saved-{saved}" for saved in SAVED),
        )
    return folder


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("carried", CARRIED)
def test_every_row_that_is_left_is_at_its_new_place_to_the_bit(
    folder, saved, carried
):
    before = np.load(folder / f"saved-{saved}" / "contents.npz")
    after = np.load(folder / f"saved-{saved}-carried-{carried}.npz")
    source_N, _ = mapping()
    there = source_N >= 0
    assert there.sum() == 5500 - 2 * FRESH
    for name in ("weight", "momentum1"):
        np.testing.assert_array_equal(
            after[name][there], before[name][source_N[there]]
        )
    assert before["momentum1"].any() and not after["momentum1"][~there].any()
    assert after["updates"] == before["updates"] == 3


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("carried", CARRIED)
def test_new_rows_begin_among_those_of_their_group(folder, saved, carried):
    after = np.load(folder / f"saved-{saved}-carried-{carried}.npz")
    source_N, group_N = mapping()
    whole = after["weight"][(source_N >= 0) & (group_N >= 0)].astype(np.float64)
    for number, (first, last) in enumerate(GROUPS):
        rows = np.arange(first, last)
        new = rows[source_N[rows] < 0]
        others = (
            after["weight"][rows[source_N[rows] >= 0]].astype(np.float64)
            if number < 2
            else whole
        )
        expected = others.mean(0) + after["start"][
            new
        ] / CONFIG.init_std * others.std(0)
        assert len(new) == (FRESH if number < 2 else last - first)
        np.testing.assert_allclose(after["weight"][new], expected, atol=1e-6)
        assert np.abs(expected - after["start"][new]).max() > 0.01
    np.testing.assert_array_equal(
        after["weight"][group_N < 0], after["start"][group_N < 0]
    )


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("carried", CARRIED)
def test_the_table_is_to_the_bit_what_the_plain_way_gives(
    folder, saved, carried
):
    """Where all rows are drawn first, and every rank has the whole old table."""
    found = np.load(folder / f"saved-{saved}-carried-{carried}.npz")
    for name in ("weight", "momentum1"):
        np.testing.assert_array_equal(found[name], found[f"by_hand_{name}"])


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("carried", CARRIED)
def test_each_row_is_read_by_one_rank(folder, saved, carried):
    """Of the weights and of the optimizer's state. A file is opened for its header, and by those that read from it."""
    opens, rows = np.load(folder / f"saved-{saved}-carried-{carried}.npz")[
        "read"
    ]
    assert rows == 2 * OLD
    assert opens <= 2 * saved + carried - 1


def test_a_rank_that_cannot_read_ends_all(folder, tmp_path):
    """No rank waits for the rows of one that has met a file that is cut short."""
    shutil.copytree(folder / "saved-3", tmp_path / "saved-3")
    file = tmp_path / "saved-3" / "table-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = start_on_cpu_ranks(
        2, "tests.helpers.carry_worker", "carry", tmp_path, tmp_path / "saved-3"
    )
    assert done.returncode != 0 and "SafetensorError" in done.stderr
    assert "another rank cannot read its rows" in done.stderr


def test_a_block_of_any_size_gives_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("embeddings.warm_start._BLOCK", 700)
    with_ranks(1, "carry", tmp_path, folder / "saved-3")
    found, expected = (
        np.load(tmp_path / "saved-3-carried-1.npz"),
        np.load(folder / "saved-3-carried-1.npz"),
    )
    np.testing.assert_allclose(found["weight"], expected["weight"], atol=1e-7)
    np.testing.assert_array_equal(found["momentum1"], expected["momentum1"])


def test_what_is_kept_of_vectors_and_state(folder, tmp_path):
    with group_of_one():
        carry_worker.carry(tmp_path, folder / "saved-3", kept=0.25)
    found, whole = (
        np.load(tmp_path / "saved-3-carried-1.npz"),
        np.load(folder / "saved-3-carried-1.npz"),
    )
    np.testing.assert_array_equal(found["weight"], whole["weight"] / 4)
    np.testing.assert_array_equal(found["momentum1"], whole["momentum1"] / 16)


@pytest.mark.parametrize(
    ("saved", "dim", "optimizer", "message"),
    [
        (
            "rowwise_adagrad",
            2 * DIM,
            "rowwise_adagrad",
            "weight is .*, this table has rows of",
        ),
        (
            "rowwise_adagrad",
            DIM,
            "adagrad",
            "momentum1 is .*, this table has rows of",
        ),
        ("sgd", DIM, "adagrad", "lacks the optimizer's momentum1"),
        (
            None,
            DIM,
            "rowwise_adagrad",
            "hold 0 of the .* rows that rank 0 asks for",
        ),
    ],
)
def test_another_table_is_not_carried(tmp_path, saved, dim, optimizer, message):
    with group_of_one():
        if saved:
            ShardCopy(
                ItemTable(OLD, DIM, TableConfig(optimizer=saved), 1, "cpu")
            ).write(tmp_path)
        table = ItemTable(NEW, dim, TableConfig(optimizer=optimizer), 2, "cpu")
        with pytest.raises(ValueError, match=message):
            carry_rows(table, tmp_path, *mapping(), CONFIG.init_std)
