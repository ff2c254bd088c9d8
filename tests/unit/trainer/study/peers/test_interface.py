"""What a peer is handed is our split and our candidates; its scores are ranked by our rules."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays

from tests.helpers.alone import group_of_one
from tests.helpers.made import draw_histories, draw_ticks, write_dataset
from trainer.config.evaluation import EvaluationConfig
from trainer.config.load import load_config
from trainer.data.loading.timeline import split_dataset
from trainer.data.split import SPLIT_LENGTH
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.evaluation.metrics import (
    candidate_positions,
    mean_ndcg,
    metrics_of_histogram,
    padded_candidate_positions,
    positions_among_all,
)
from trainer.evaluation.sampled import RankingBatches
from trainer.study.peers import dataset_export
from trainer.study.peers.dataset_export import LOG, export_dataset, write_log
from trainer.study.peers.interface import SPLITS, PeerDataset

HISTORIES = draw_histories(30, items=(30, 12), longest=9)
LONG = {
    user: history
    for user, history in enumerate(HISTORIES)
    if len(history) >= SPLIT_LENGTH
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("study") / "data",
        HISTORIES,
        (30, 12),
        cuts=(7, 20),
        streams=3,
    )


@pytest.fixture(scope="module")
def handed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    write_log(export_dataset(dataset, folder, seed=3, negatives=20))
    return PeerDataset(folder)


def test_users_and_histories_are_those_that_can_be_split(handed):
    assert 0 < len(LONG) < len(HISTORIES)
    assert handed.user_U.tolist() == list(LONG)
    assert handed.lengths_U.tolist() == [
        len(history) for history in LONG.values()
    ]
    assert handed.items_N.tolist() == [
        int(item) for history in LONG.values() for item in history
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_candidates_are_those_that_our_evaluation_ranks_shorter_lists_filled_up(
    dataset, handed, split
):
    own = {}
    for built in RankingBatches(
        dataset, 0, 1, EvaluationConfig(negatives=20), 64, split, seed=3
    ):
        rows = np.split(built.rows_C, np.cumsum(built.counts_B)[:-1])
        own |= {
            int(user): row.tolist()
            for user, row in zip(built.user_B, rows, strict=True)
            if user >= 0
        }
    found_UC = handed.load(f"candidates-{split}")
    assert found_UC.shape == (len(LONG), 21) and (found_UC == -1).any()
    assert {
        int(u): row[row >= 0].tolist()
        for u, row in zip(handed.user_U, found_UC, strict=True)
    } == own
    assert found_UC[:, 0].tolist() == [
        history[-SPLITS[split]] for history in LONG.values()
    ]


@pytest.mark.parametrize("back", SPLITS.values())
def test_padded_histories_are_the_newest_before_what_is_held_out(handed, back):
    users = np.arange(len(LONG))[::2]
    items_BT, lengths_B = handed.padded(users, back, 4)
    for user, items, length in zip(
        users, items_BT.tolist(), lengths_B, strict=True
    ):
        expected = list(LONG.values())[user][:-back][-4:].tolist()
        assert items == expected + [0] * (4 - len(expected)) and length == len(
            expected
        )


@pytest.mark.parametrize("back", SPLITS.values())
def test_others_are_all_else_of_a_history(handed, back):
    users = np.arange(len(LONG))[1::2]
    user_E, rows_E = handed.other_items(users, back)
    for place, user in enumerate(users):
        history = list(LONG.values())[user]
        assert (
            rows_E[user_E == place].tolist()
            == np.delete(history, len(history) - back).tolist()
        )


def test_the_log_is_the_training_part_in_order_and_all_items(dataset, handed):
    with open(handed.folder / LOG / f"{LOG}.inter", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    assert header == ["user_id:token", "item_id:token", "timestamp:float"]
    expected = [
        [str(user), str(item), str(place)]
        for user, history in enumerate(LONG.values())
        for place, item in enumerate(history[:-2])
    ]
    assert lines == expected
    with open(handed.folder / LOG / f"{LOG}.item", newline="") as file:
        items = file.read().split()
    assert items == [
        "item_id:token",
        *(
            str(d.start + item)
            for d in dataset.domains
            for item in range(d.items)
        ),
    ]


def test_a_dataset_of_users_too_short_to_split_is_refused(tmp_path):
    short = write_dataset(tmp_path / "data", [np.array([0, 1])] * 3)
    with pytest.raises(InputError, match="no user has the 3 interactions"):
        export_dataset(short, tmp_path)


@pytest.fixture(scope="module")
def timeline(dataset):
    """The dataset, split by time."""
    given = [
        "split.kind=timeline",
        "split.whose=newest",
        "split.validation=0.3",
        "split.test=0.3",
    ]
    with group_of_one():
        ranks = Ranks(0, 1, 0, torch.device("cpu"))
        return split_dataset(dataset, load_config([], given), ranks)


@pytest.fixture(scope="module")
def handed_by_time(timeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given by time")
    with pytest.MonkeyPatch.context() as patch:
        # As a dataset that is not read at once.
        patch.setattr(dataset_export, "_AT_ONCE", 7)
        write_log(export_dataset(timeline, folder, seed=3, negatives=4))
    return PeerDataset(folder)


def test_by_the_timeline_all_users_are_handed_with_what_came_before_the_cut(
    timeline, handed_by_time
):
    handed = handed_by_time
    assert handed.user_U.tolist() == list(range(len(HISTORIES)))
    ticks = draw_ticks(HISTORIES)
    before = [
        [int(item) for item, tick in zip(history, of_user, strict=True)
         if tick < timeline.split.validation_tick]
        for history, of_user in zip(HISTORIES, ticks, strict=True)
    ]  # fmt: skip
    assert handed.training_U.tolist() == [len(items) for items in before]
    assert 0 in handed.training_U
    with open(handed.folder / LOG / f"{LOG}.inter", newline="") as file:
        _, *lines = csv.reader(file, delimiter="\t")
    assert lines == [
        [str(user), str(item), str(place)]
        for user, items in enumerate(before)
        for place, item in enumerate(items)
    ]
    trained = {item for items in before for item in items}
    assert set(np.flatnonzero(handed.load("ranked")).tolist()) == trained


@pytest.mark.parametrize("split", SPLITS)
def test_by_the_timeline_targets_and_candidates_are_those_that_count_in_ours(
    timeline, handed_by_time, split
):
    own = {}
    unseen = 0
    for built in RankingBatches(
        timeline, 0, 1, EvaluationConfig(negatives=4), 64, split, seed=3
    ):
        rows = np.split(built.rows_C, np.cumsum(built.counts_B)[:-1])
        for user, row in zip(built.user_B, rows, strict=True):
            if user < 0:
                continue
            if timeline.is_trained(row[0]):
                own[int(user)] = row.tolist()
            else:
                unseen += 1
    assert own and unseen
    user_T, back_T = handed_by_time.targets(split)
    found_TC = handed_by_time.load(f"candidates-{split}")
    found = {
        int(user): row[row >= 0].tolist()
        for user, row in zip(user_T, found_TC, strict=True)
    }
    assert found == own
    for user, back, row in zip(user_T, back_T, found_TC, strict=True):
        assert HISTORIES[user][-back] == row[0]
        items_BT, _ = handed_by_time.padded(
            np.array([user]), np.array([back]), 3
        )
        newest = HISTORIES[user][:-back][-3:].tolist()
        assert items_BT[0].tolist() == newest + [0] * (3 - len(newest))


FEW_SCORES = strategies.sampled_from([0.0, 1.0, 2.0, np.nan, np.inf, -np.inf])


@given(arrays(np.float32, (4, 6), elements=FEW_SCORES), arrays(bool, (4, 6)))
def test_sampled_positions_are_those_of_our_evaluation(scores_BC, there_BC):
    there_BC[:, 0] = True
    expected = candidate_positions(scores_BC[there_BC], there_BC.sum(1))
    assert (
        padded_candidate_positions(scores_BC, there_BC).tolist()
        == expected.tolist()
    )


PLACES, PAIRS = (
    strategies.integers(0, 4),
    strategies.tuples(strategies.integers(0, 2), strategies.integers(0, 4)),
)


@given(
    arrays(np.float32, (3, 5), elements=FEW_SCORES),
    arrays(np.int64, 3, elements=PLACES),
    strategies.lists(PAIRS),
)
def test_full_positions_count_other_items_that_are_not_excluded(
    scores_BN, place_B, pairs
):
    excluded = tuple(
        np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1)
    )
    for user, place in enumerate(place_B):
        others = (
            set(range(5))
            - {place}
            - {item for who, item in pairs if who == user}
        )
        ahead = sum(
            not scores_BN[user, place] > scores_BN[user, item]
            for item in others
        )
        assert (
            positions_among_all(scores_BN, place_B, excluded)[user] == 1 + ahead
        )


def test_the_mean_is_over_domains_with_users_as_in_our_evaluation():
    rank_U, domain_U = np.array([1, 2, 40, 10, 11]), np.array([0, 0, 0, 2, 2])
    means = [
        metrics_of_histogram(
            np.bincount(rank_U[domain_U == domain], minlength=101)[1:]
        )["NDCG@10"]
        for domain in (0, 2)
    ]
    assert mean_ndcg(rank_U, domain_U) == pytest.approx(np.mean(means))
    assert mean_ndcg(rank_U[:0], domain_U[:0]) == 0
