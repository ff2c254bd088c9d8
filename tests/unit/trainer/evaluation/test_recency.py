"""Recency popularity against loops over events: among candidates, among all items, and its half-life."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.made import draw_histories, draw_ticks, write_dataset
from trainer.config.load import load_config
from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.data.loading.day_counts import count_recent
from trainer.data.recent_counts import Days
from trainer.evaluation.full import HeldOutBatches
from trainer.evaluation.metrics import metric_values
from trainer.evaluation.recency import choice
from trainer.evaluation.recency.choice import HALF_LIVES, choose_half_life
from trainer.evaluation.recency.ranking import (
    FullRecencyRanking,
    HalfLifeChoice,
    RecencyPopularity,
)
from trainer.evaluation.recency.sample import CandidatesAlone
from trainer.evaluation.sampled import RankingBatches

ITEMS, STARTS = (30, 12, 8), (0, 33, 48)
SEED = 3


@pytest.fixture(scope="module")
def histories():
    return draw_histories(70, ITEMS, longest=12)


@pytest.fixture(scope="module")
def ticks(histories):
    return draw_ticks(histories)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories, ticks):
    return write_dataset(
        tmp_path_factory.mktemp("recency") / "data",
        histories,
        ITEMS,
        cuts=(11, 26),
        streams=3,
        ticks=ticks,
    )


@pytest.fixture(scope="module")
def config(dataset):
    return load_config(
        [],
        [
            f"data={dataset.folder}",
            "stream.workers=0",
            "evaluation.batch_size=16",
            "evaluation.negatives=9",
            "evaluation.min_users=1",
            f"seed={SEED}",
        ],
    )


def recency_of(dataset, ranks, config, half_life=7):
    counts = count_recent(dataset, ranks, config.stream)
    chosen = HalfLifeChoice(half_life, counts.days.unit, {})
    return RecencyPopularity(counts, chosen, SEED)


def chosen_for(dataset, ranks, config):
    counts = count_recent(dataset, ranks, config.stream)
    return choose_half_life(counts, dataset, ranks, config)


def by_hand(dataset, histories, ticks, row, tick, half_life):
    """The faded count of an item before the day of a tick."""
    number_T = Days.of(dataset).number_T
    total = 0.0
    for items, times in zip(histories, ticks, strict=True):
        for item, time in zip(items, times, strict=True):
            age = int(number_T[tick]) - int(number_T[time])
            if item == row and age > 0:
                total += 0.5 ** (age / half_life)
    return total


def ranked(batches, visit):
    for batch in batches:
        ends = np.cumsum(batch.counts_B)
        for place, user in enumerate(batch.user_B):
            if user >= 0:
                begin = ends[place] - batch.counts_B[place]
                visit(
                    batch, place, int(user), batch.rows_C[begin : ends[place]]
                )


def sampled_batches(dataset, config, split):
    return RankingBatches(
        dataset, 0, 1, config.evaluation, 100, split, SEED, None, config.stream
    )


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
def test_candidates_are_in_the_order_of_a_loop_over_earlier_days(
    ranks, dataset, histories, ticks, config, split, back
):
    recency = recency_of(dataset, ranks, config)
    users = 0
    for batch in sampled_batches(dataset, config, split):
        scores = recency.candidate_scores(
            batch.user_B, batch.now_B, batch.counts_B, batch.rows_C
        )
        ends = np.cumsum(batch.counts_B)
        for place, user in enumerate(batch.user_B):
            assert batch.now_B[place] == ticks[user][-back]
            own = slice(ends[place] - batch.counts_B[place], ends[place])
            key = {
                row: (
                    np.float32(
                        by_hand(
                            dataset,
                            histories,
                            ticks,
                            row,
                            batch.now_B[place],
                            7,
                        )
                    ).round(4),
                    random_unit(
                        random_bits(
                            SEED, RandomStream.POPULARITY_TIES, user, row
                        )
                    ),
                )
                for row in batch.rows_C[own].tolist()
            }
            found = batch.rows_C[own][np.argsort(scores[own])].tolist()
            assert [key[row][0] for row in found] == sorted(
                count for count, _ in key.values()
            )
            untouched = [row for row in found if not key[row][0]]
            assert untouched == sorted(untouched, key=lambda row: key[row][1])
            users += 1
    assert users == dataset.users - dataset.too_short


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
def test_all_items_of_a_domain_are_ranked_as_of_each_users_day(
    ranks, dataset, histories, ticks, config, split, back
):
    recency = recency_of(dataset, ranks, config)
    full = FullRecencyRanking(recency, dataset)
    held = list(
        HeldOutBatches(dataset, 0, 1, config.evaluation, 100, split, SEED)
    )
    for batch in held:
        full.add(
            batch.user_B,
            batch.domain_B,
            batch.row_B,
            batch.now_B,
            batch.counts_B,
            batch.rows_E,
        )
    positions = full.positions()
    assert [len(step) for step in positions] == [
        len(batch.user_B) for batch in held
    ]
    between = 0
    for batch, position_B in zip(held, positions, strict=True):
        for user, domain, row, now, position in zip(
            batch.user_B,
            batch.domain_B,
            batch.row_B,
            batch.now_B,
            position_B,
            strict=True,
        ):
            assert now == ticks[user][-back]
            others = set(histories[user].tolist()[: -back or None])
            others |= set(
                histories[user].tolist()[len(histories[user]) - back + 1 :]
            )
            start = STARTS[domain]
            rivals = [
                by_hand(dataset, histories, ticks, item, now, 7)
                for item in range(start, start + ITEMS[domain])
                if item != row and item not in others
            ]
            own = by_hand(dataset, histories, ticks, row, now, 7)
            greater = sum(count > own * (1 + 1e-6) for count in rivals)
            equal = sum(abs(count - own) <= 1e-6 * own for count in rivals)
            assert 1 + greater <= position <= 1 + greater + equal
            between += 1 + greater < position
    # Ties are not all for the held-out item. Few are tied at the end of the log.
    assert between or split == "test"


def test_no_users_have_no_positions(ranks, dataset, config):
    recency = recency_of(dataset, ranks, config)
    assert FullRecencyRanking(recency, dataset).positions() == []


def test_the_half_life_is_the_best_of_validation(ranks, dataset, config):
    """Each one's mean NDCG@10 over domains is that of its own ranking."""
    chosen = chosen_for(dataset, ranks, config)
    assert list(chosen.validation) == list(HALF_LIVES)
    assert chosen.validation[chosen.half_life] == max(
        chosen.validation.values()
    )
    assert chosen.unit == "hundredths of the log's time"
    for half_life in HALF_LIVES:
        recency = recency_of(dataset, ranks, config, half_life)
        gains = {0: [], 1: [], 2: []}

        def visit(batch, place, user, rows, recency=recency, gains=gains):
            scores = recency.candidate_scores(
                np.array([user]),
                batch.now_B[place : place + 1],
                np.array([len(rows)]),
                rows,
            )
            position = 1 + np.count_nonzero(scores[1:] > scores[0])
            gains[int(batch.domain_B[place])].append(
                metric_values("NDCG@10", np.array([position]))[0]
            )

        ranked(sampled_batches(dataset, config, "validation"), visit)
        mean = np.mean([np.mean(values) for values in gains.values()])
        assert chosen.validation[half_life] == pytest.approx(mean)
    record = chosen.to_record()
    assert record["validation"][str(record["half_life"])] == max(
        record["validation"].values()
    )


def test_of_many_users_a_share_chooses_the_same_on_any_ranks(
    ranks, dataset, config, monkeypatch
):
    monkeypatch.setattr(choice, "_MOST_USERS", 35)
    seen = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        part = dataclasses.replace(ranks, rank=rank, world_size=world_size)
        batches = CandidatesAlone(dataset, part, config, 35)
        users = np.concatenate([batch.user_B for batch in batches])
        seen.append(set(users[users >= 0].tolist()))
    whole, *parts = seen
    assert whole == parts[0] | parts[1] and not parts[0] & parts[1]
    assert 15 < len(whole) < 50
    assert chosen_for(dataset, ranks, config).validation


@pytest.mark.parametrize("full", [False, True], ids=["sampled", "full"])
def test_moving_an_event_of_a_later_day_changes_no_rank(
    ranks, dataset, histories, ticks, config, tmp_path, full
):
    """The newest event of all is another item's: only users who are asked on later days may see it."""
    newest = max(range(len(ticks)), key=lambda user: ticks[user][-1])
    day = Days.of(dataset).number_T[ticks[newest][-1]]
    changed = [items.copy() for items in histories]
    changed[newest][-1] = (changed[newest][-1] + 1) % ITEMS[0]
    other = write_dataset(
        tmp_path / "data", changed, ITEMS, cuts=(11, 26), streams=3, ticks=ticks
    )

    def positions(data):
        recency = recency_of(data, ranks, config)
        found = {}
        for batch in sampled_batches(data, config, "test"):
            scores = recency.candidate_scores(
                batch.user_B, batch.now_B, batch.counts_B, batch.rows_C
            )
            ends = np.cumsum(batch.counts_B)
            for place, user in enumerate(batch.user_B):
                own = slice(ends[place] - batch.counts_B[place], ends[place])
                found[int(user)] = np.argsort(scores[own]).tolist()
        return found

    def full_positions(data):
        ranking = FullRecencyRanking(recency_of(data, ranks, config), data)
        users = []
        for batch in HeldOutBatches(
            data, 0, 1, config.evaluation, 100, "test", SEED
        ):
            ranking.add(
                batch.user_B,
                batch.domain_B,
                batch.row_B,
                batch.now_B,
                batch.counts_B,
                batch.rows_E,
            )
            users.append(batch.user_B)
        return dict(
            zip(
                np.concatenate(users).tolist(),
                np.concatenate(ranking.positions()).tolist(),
                strict=True,
            )
        )

    rank = full_positions if full else positions
    before, after = rank(dataset), rank(other)
    assert before.keys() == after.keys()
    for user in before:
        asked = Days.of(dataset).number_T[ticks[user][-1]]
        assert asked <= day
        if user != newest:
            assert before[user] == after[user]


def test_an_event_of_an_earlier_day_does_count(
    ranks, dataset, histories, ticks, config
):
    """The test before is not empty: what is earlier moves ranks."""
    recency = recency_of(dataset, ranks, config)
    row = np.array([int(histories[0][0])])
    day = Days.of(dataset).number_T[ticks[0][0]]
    assert recency.count(row, np.array([day + 1])) > recency.count(
        row, np.array([day])
    ) / 2 ** (1 / 7)


def test_a_dataset_without_a_split_user_has_a_half_life_too(
    ranks, tmp_path, config
):
    made = write_dataset(tmp_path / "data", [np.array([0, 1])], ITEMS)
    chosen = chosen_for(
        made, ranks, dataclasses.replace(config, data=str(made.folder))
    )
    assert chosen.half_life == HALF_LIVES[0]
    assert set(chosen.validation.values()) == {0.0}
