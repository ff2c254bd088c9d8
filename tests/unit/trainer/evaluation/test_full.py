"""Ranking among all items against loops over items."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from embeddings.config import TableConfig
from embeddings.table import ItemTable
from syncrec.batch.build import build_query
from tests.helpers.made import draw_histories, spoil_block, write_dataset
from trainer.config.load import load_config
from trainer.data.format.dataset import Dataset
from trainer.data.format.vocabulary import read_item_counts
from trainer.errors import InputError
from trainer.evaluation.full import (
    BREAKDOWNS,
    FullRanking,
    HeldOutBatch,
    HeldOutBatches,
    full_record,
    groups,
    groups_of_domain,
    rank_fully,
    recommended,
)
from trainer.evaluation.popularity import Popularity

ITEMS, STARTS = (30, 12, 8), (0, 33, 48)
DIM = 8


class Model(torch.nn.Module):
    """A user's vector is the mean of the history's, or ones."""

    def forward(self, query, rows):
        tokens = query.cross
        y_BR = torch.ones(len(query.newest_B), DIM)
        for place in range(len(y_BR)):
            inputs = tokens.input_M[tokens.sequence_M == place]
            inputs = inputs[inputs > 0]
            if len(inputs):
                y_BR[place] = rows[inputs - 1].mean(0)
        return y_BR.unsqueeze(1).expand(-1, len(ITEMS), -1)


@pytest.fixture(scope="module")
def histories():
    found = draw_histories(70, ITEMS, longest=12)
    found[5][:] = found[5][0]  # the held-out item is in the history too
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories):
    return write_dataset(
        tmp_path_factory.mktemp("full") / "data",
        histories,
        ITEMS,
        cuts=(11, 12, 26, 40, 44),
        streams=5,
    )


@pytest.fixture
def table(ranks, dataset):
    return ItemTable(
        dataset.num_embeddings,
        DIM,
        TableConfig(optimizer="sgd", init_std=0.5),
        7,
        "cpu",
    )


def configured(dataset, *settings):
    return load_config(
        [],
        [
            f"data={dataset.folder}",
            "stream.workers=0",
            "evaluation.batch_size=16",
            "seed=3",
            *settings,
        ],
    )


def domain_of(row):
    return max(d for d in range(3) if STARTS[d] <= row)


def items_of(domain):
    return range(STARTS[domain], STARTS[domain] + ITEMS[domain])


def by_hand(histories, back, vectors, counts):
    """[(user, domain, rank, best and worst rank by popularity, names of its groups)], and how often items are shown."""
    found, shown = [], np.zeros(len(vectors), int)
    for user, items in enumerate(histories):
        items = items.tolist()
        if len(items) < 3:
            continue
        history, target, others = (
            items[:-back],
            items[-back],
            items[:-back] + items[len(items) - back + 1 :],
        )
        domain = domain_of(target)
        y = vectors[history].mean(0)
        score = {
            row: np.float32(vectors[row].double() @ y.double())
            for row in range(len(vectors))
        }
        rivals = [
            row
            for row in items_of(domain)
            if row not in others and row != target
        ]
        rank = 1 + sum(score[row] >= score[target] for row in rivals)
        least = 1 + sum(counts[row] > counts[target] for row in rivals)
        most = least + sum(counts[row] == counts[target] for row in rivals)
        length = (
            "1–4"
            if len(history) < 5
            else "5–9"
            if len(history) < 10
            else "10–19"
        )
        own = (
            "some"
            if any(domain_of(row) == domain for row in history)
            else "none"
        )
        found.append((user, domain, rank, least, most, length, own))
        for d in range(3):
            left = [row for row in items_of(d) if row not in others]
            shown[sorted(left, key=lambda row: -score[row])[:10]] += 1
    return found, shown


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
def test_ranks_groups_and_what_is_shown_are_those_of_loops(
    ranks, dataset, histories, table, split, back
):
    vectors = table(torch.arange(dataset.num_embeddings)).detach()
    expected, shown = by_hand(
        histories, back, vectors, read_item_counts(dataset)
    )
    done = []
    found = rank_fully(
        Model(),
        table,
        dataset,
        ranks,
        configured(dataset),
        split,
        lambda *now: done.append(now),
    )
    assert done[-1][0] == done[-1][1] == len(done)
    np.testing.assert_array_equal(found.shown, shown)
    size = groups_of_domain()
    for domain in range(3):
        own = [case for case in expected if case[1] == domain]
        figures = found.means.figures(0, domain * size)
        assert figures["users"] == len(own) > 0
        assert figures["MRR"] == pytest.approx(
            np.mean([1 / case[2] for case in own])
        )
        assert figures["HR@5"] == pytest.approx(
            np.mean([case[2] <= 5 for case in own])
        )
        mrr = found.means.figures(1, domain * size)["MRR"]
        assert (
            np.mean([1 / case[4] for case in own]) - 1e-9
            <= mrr
            <= np.mean([1 / case[3] for case in own]) + 1e-9
        )
        breakdown = full_record(split, dataset, found)["breakdown"][
            f"domain {domain}"
        ]
        for name, column in (("history length", 5), ("history in domain", 6)):
            for group, values in breakdown[name].items():
                those = [case for case in own if case[column] == group]
                assert values["users"] == len(those)
                assert values["MRR"] == (
                    pytest.approx(np.mean([1 / case[2] for case in those]))
                    if those
                    else None
                )


def test_one_domain_alone_is_ranked_by_its_own_history(
    ranks, dataset, histories, table
):
    """Its users are those whose held-out item it has; what they had of other domains is not looked at."""
    vectors, expected = table(torch.arange(dataset.num_embeddings)).detach(), []
    for items in (
        history.tolist()
        for history in histories
        if len(history) >= 3 and domain_of(history[-1]) == 1
    ):
        own = [row for row in items[:-1] if domain_of(row) == 1]
        y = vectors[own].mean(0) if own else torch.ones(DIM)
        score = {
            row: np.float32(vectors[row].double() @ y.double())
            for row in items_of(1)
        }
        expected.append(
            1
            + sum(
                score[row] >= score[items[-1]]
                for row in items_of(1)
                if row not in items
            )
        )
    found = rank_fully(
        Model(),
        table,
        dataset,
        ranks,
        configured(dataset, "stream.domain=domain 1"),
        "test",
    )
    figures = [
        found.means.figures(0, domain * groups_of_domain())
        for domain in range(3)
    ]
    assert [figure["users"] for figure in figures] == [0, len(expected), 0]
    assert figures[1]["MRR"] == pytest.approx(
        np.mean([1 / rank for rank in expected])
    )
    assert set(domain_of(row) for row in np.flatnonzero(found.shown)) == {1}


def test_memory_does_not_grow_by_the_items_in_every_step(ranks, dataset):
    """Beside one count an item, which there is from the beginning."""
    rows = 4_000_000
    last = dataset.domains[-1]
    grown = dataclasses.replace(dataset.domains[-1], room=rows - last.start)
    many = dataclasses.replace(dataset, domains=(*dataset.domains[:-1], grown))
    table = ItemTable(
        rows, DIM, TableConfig(optimizer="sgd", init_std=0.5), 7, "cpu"
    )
    begun = []

    def advance(done, total):
        if done == 1:
            begun.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        found = rank_fully(
            Model(), table, many, ranks, configured(many), "test", advance
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.shown.nbytes == 8 * rows and found.shown.sum() > 0
    assert peak - begun[0] < 4 * rows


def held_of(dataset, split="test"):
    config = configured(dataset)
    return list(
        HeldOutBatches(
            dataset, 0, 1, config.evaluation, 100, split, config.seed
        )
    )


def test_popularity_is_ranked_as_a_loop_would_with_ties_at_random(
    dataset, histories
):
    counts, ties = read_item_counts(dataset), []
    for seed, held in (
        (seed, held) for seed in range(4) for held in held_of(dataset)
    ):
        positions = Popularity(dataset, seed).positions(
            held.user_B, held.domain_B, held.row_B, held.counts_B, held.rows_E
        )
        for user, row, rank in zip(
            held.user_B, held.row_B, positions, strict=True
        ):
            others = set(histories[user][:-1].tolist()) | {row}
            rivals = counts[
                [
                    item
                    for item in items_of(domain_of(row))
                    if item not in others
                ]
            ]
            before, equal = (
                rank - 1 - np.count_nonzero(rivals > counts[row]),
                np.count_nonzero(rivals == counts[row]),
            )
            assert 0 <= before <= equal
            ties += [(before + 0.5) / (equal + 1)] if equal > 2 else []
    assert (
        len(ties) > 20 and 0.3 < np.mean(ties) < 0.7 and np.std(ties) > 0.15
    )  # neither all before nor all behind


def test_thirds_have_a_third_of_the_interactions_each(tmp_path):
    rows = (
        [0] * 6 + [1] * 3 + [2] * 2 + [3] * 2 + [4] * 2 + [5] * 3
    )  # 18 of domain 0; row 6 has none
    dataset = write_dataset(
        tmp_path / "data", [np.array(rows + [0, 0])], items=(7, 2)
    )
    assert Popularity(dataset, 0).third_N[:7].tolist() == [0, 1, 2, 2, 2, 1, 2]
    assert Popularity(dataset, 0).third_N[10:12].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("length", "own", "third", "expected"),
    [
        (1, 0, 0, [0, 0, 0]),
        (4, 1, 1, [1, 0, 1]),
        (5, 4, 2, [2, 1, 1]),
        (49, 0, 2, [2, 3, 0]),
        (50, 9, 0, [0, 4, 1]),
        (999, 1, 0, [0, 4, 1]),
    ],
)
def test_the_groups_of_a_user(length, own, third, expected):
    query = build_query(
        np.zeros(0, np.int64), np.zeros(1, np.int64), 4, np.zeros(0, np.int64)
    )
    one = np.ones(1, np.int64)
    held = HeldOutBatch(
        query,
        one,
        2 * one,
        one,
        0 * one,
        length * one,
        own * one,
        one[:0],
        0 * one,
        one,
    )
    starts = np.cumsum([1, *map(len, BREAKDOWNS.values())])[:-1]
    first = 2 * groups_of_domain()
    places = (0, *(starts + expected))
    assert groups(held, third * one, one == 1).tolist() == [
        [first + place for place in places]
    ]
    unseen = first + groups_of_domain() - 1
    assert unseen == first + starts[-1] + len(BREAKDOWNS["history in domain"])
    assert groups(held, third * one, one == 0).tolist() == [
        [unseen, -1, -1, -1]
    ]


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_users_and_one_without_users_keeps_its_place(
    dataset, world_size
):
    expected, found, empty, config = [], [], 0, configured(dataset)
    for held in held_of(dataset):
        expected += held.user_B.tolist()
    for rank in range(world_size):
        batches = list(
            HeldOutBatches(
                dataset,
                rank,
                world_size,
                config.evaluation,
                100,
                "test",
                config.seed,
            )
        )
        assert len(batches) == len(
            HeldOutBatches(
                dataset,
                0,
                world_size,
                config.evaluation,
                100,
                "test",
                config.seed,
            )
        )
        for held in batches:
            found += held.user_B.tolist()
            empty += len(held.user_B) == 0
            assert len(held.query.newest_B) == max(1, len(held.user_B))
    assert sorted(found) == sorted(expected) and len(set(expected)) == len(
        expected
    )
    assert empty or world_size == 2


@pytest.mark.parametrize(
    ("counts", "coverage", "gini"),
    [
        ([1, 1, 1, 1], 1, 0),
        ([0, 0, 0, 8], 0.25, 0.75),
        ([0, 2, 2, 0], 0.5, 0.5),
        ([3], 1, 0),
        ([1, 2, 3], 1, 2 / 9),
    ],
)
def test_coverage_and_gini_are_their_definitions(counts, coverage, gini):
    found = recommended(np.array(counts))
    assert found == {
        "items": len(counts),
        "coverage@10": coverage,
        "gini@10": pytest.approx(gini),
    }
    pairs = np.abs(np.subtract.outer(counts, counts)).sum() / (
        2 * len(counts) ** 2 * np.mean(counts)
    )
    assert found["gini@10"] == pytest.approx(pairs)


def test_nobody_is_shown_anything():
    assert recommended(np.zeros(3, int)) == {
        "items": 3,
        "coverage@10": None,
        "gini@10": None,
    }


def test_users_of_a_damaged_block_are_refused_or_left_out(
    ranks, tmp_path, histories, table
):
    dataset = write_dataset(tmp_path / "data", histories, ITEMS)
    spoil_block(dataset, 0, 1)
    with pytest.raises(InputError, match=r"000000\.tar"):
        rank_fully(Model(), table, dataset, ranks, configured(dataset), "test")
    found = rank_fully(
        Model(),
        table,
        dataset,
        ranks,
        configured(dataset, "stream.damaged=skip"),
        "test",
    )
    assert found.skipped_users == 3 and found.reasons
    assert (
        full_record("test", Dataset.load(dataset.folder), found)[
            "skipped_users"
        ]
        == 3
    )
    assert isinstance(found, FullRanking)
