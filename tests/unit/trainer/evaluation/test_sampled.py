import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tests.helpers.made import (
    draw_histories,
    draw_ticks,
    spoil_block,
    write_dataset,
)
from trainer.config.evaluation import EvaluationConfig
from trainer.config.load import load_config
from trainer.config.stream import StreamConfig
from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.data.format.dataset import Dataset
from trainer.data.format.vocabulary import read_item_counts
from trainer.data.loading.stream import batches_of_workers
from trainer.errors import InputError
from trainer.evaluation.evaluation import MODEL
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.sampled import (
    PositionCounts,
    RankingBatches,
    evaluate_split,
    make_evaluation_record,
    rank_candidates,
)

ITEMS, STARTS = (30, 12, 8), (0, 33, 48)
SEED = 3


@pytest.fixture(scope="module")
def histories():
    return draw_histories(50, ITEMS, longest=12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories):
    return write_dataset(
        tmp_path_factory.mktemp("rank") / "data",
        histories,
        ITEMS,
        cuts=(11, 12, 26, 40, 44),
        streams=5,
    )


def batches_of(
    dataset,
    split="test",
    rank=0,
    world_size=1,
    batch_size=7,
    negatives=9,
    given=None,
    max_length=100,
    stream=None,
):
    config = EvaluationConfig(negatives=negatives, batch_size=batch_size)
    return RankingBatches(
        dataset,
        rank,
        world_size,
        config,
        max_length,
        split,
        SEED,
        given,
        stream,
    )


def users_of(batches):
    """Every ranked user: {number: (history, domain, candidates)}; a user twice is an error."""
    found = {}
    for candidates in batches:
        query, tokens = candidates.query, candidates.query.cross
        ids = query.ids.numpy()
        np.testing.assert_array_equal(
            ids[query.interactions :], candidates.rows_C
        )
        ends = np.cumsum(candidates.counts_B)
        for place, user in enumerate(candidates.user_B):
            if user < 0:
                assert len(candidates.user_B) == 1
                continue
            assert user not in found
            inputs = tokens.input_M[tokens.sequence_M == place]
            history = ids[inputs[inputs > 0].numpy() - 1].tolist()
            rows = candidates.rows_C[
                ends[place] - candidates.counts_B[place] : ends[place]
            ]
            found[int(user)] = (
                history,
                int(candidates.domain_B[place]),
                rows.tolist(),
            )
    return found


def domain_of(row):
    return max(d for d in range(3) if STARTS[d] <= row)


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
def test_the_held_out_item_is_ranked_after_the_history_before_it(
    dataset, histories, split, back
):
    found = users_of(batches_of(dataset, split))
    assert found.keys() == {
        user for user, history in enumerate(histories) if len(history) >= 3
    }
    assert len(found) == dataset.users - dataset.too_short < dataset.users
    for user, (history, domain, candidates) in found.items():
        own, positive = histories[user].tolist(), histories[user][-back]
        assert history == own[:-back]
        assert candidates[0] == positive and domain == domain_of(positive)
        others = set(
            range(STARTS[domain], STARTS[domain] + ITEMS[domain])
        ) - set(own)
        assert (
            len(candidates) == 1 + min(9, len(others)) == len(set(candidates))
        )
        assert set(candidates[1:]) <= others


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
@pytest.mark.parametrize("alone", [None, 1])
def test_a_history_is_asked_for_the_time_of_the_held_out_item(
    dataset, histories, split, back, alone
):
    """Each token but the newest for that of the next one that it is shown with."""
    ticks, seen = draw_ticks(histories), 0
    stream = StreamConfig(domain="domain 1") if alone else None
    for candidates in batches_of(dataset, split, stream=stream):
        tokens = candidates.query.cross
        for place, user in enumerate(candidates.user_B):
            if user < 0:  # a rank without users
                continue
            shown = zip(
                ticks[user][:-back], histories[user][:-back], strict=True
            )
            own = [
                tick for tick, row in shown if alone in (None, domain_of(row))
            ]
            asked = tokens.target_time_M[tokens.sequence_M == place].tolist()
            assert asked == [*own, ticks[user][-back]]
            seen += 1
    assert seen


def test_only_the_newest_tokens_of_a_history_are_read(dataset, histories):
    for user, (history, _, _) in users_of(
        batches_of(dataset, max_length=3)
    ).items():
        assert history == histories[user].tolist()[:-1][-3:]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_one_domain_alone_ranks_its_users_by_its_items_against_the_same_candidates(
    dataset, histories, split
):
    whole = users_of(batches_of(dataset, split))
    found = users_of(
        batches_of(dataset, split, stream=StreamConfig(domain="domain 1"))
    )
    assert (
        found.keys()
        == {user for user, (_, domain, _) in whole.items() if domain == 1}
        != whole.keys()
    )
    for user, (history, domain, candidates) in found.items():
        assert domain == 1 and candidates == whole[user][2]
        assert history == [row for row in whole[user][0] if domain_of(row) == 1]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_take_equally_many_steps_and_share_the_users(dataset, world_size):
    expected, found, steps = users_of(batches_of(dataset)), {}, set()
    for rank in range(world_size):
        batches = batches_of(dataset, rank=rank, world_size=world_size)
        own = users_of(batches)
        assert not own.keys() & found.keys()
        found |= own
        steps.add(sum(1 for _ in batches))
        assert len(batches) in steps
    assert found == expected and len(steps) == 1


def test_a_rank_without_users_in_a_step_keeps_its_place(dataset):
    """Five ranks, of which one owns the shard of a single user: it has no user in most steps."""
    empty = 0
    for rank in range(5):
        for candidates in batches_of(dataset, rank=rank, world_size=5):
            if (candidates.user_B < 0).any():
                assert candidates.user_B.tolist() == [
                    -1
                ] and candidates.counts_B.tolist() == [1]
                empty += 1
    assert empty


@pytest.mark.ranks
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_bring_the_same_users_in_the_same_steps(dataset, workers):
    built = batches_of_workers(
        batches_of(dataset), StreamConfig(workers=workers), pin_memory=False
    )
    numbers = [candidates.user_B.tolist() for candidates in built]
    assert numbers == [
        candidates.user_B.tolist() for candidates in batches_of(dataset)
    ]


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("validation", 2)])
def test_given_candidates_take_the_place_of_drawn_ones(
    dataset, histories, split, back
):
    long = [user for user, history in enumerate(histories) if len(history) >= 3]
    short = [user for user, history in enumerate(histories) if len(history) < 3]
    given_rows = {
        user: (2, np.array([48, 50, 49 + user % 2]))
        for user in [*long[::2], short[0]]
    }
    found = users_of(batches_of(dataset, split, given=given_rows))
    assert sorted(found) == long[::2]
    for user, (history, domain, candidates) in found.items():
        assert history == histories[user].tolist()[:-back]
        assert (domain, candidates) == (2, given_rows[user][1].tolist())


class Scorer:
    """Stands for table and model: the score of a candidate is what `scores` says of its row."""

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores, dtype=torch.float32)

    def __call__(self, ids):
        return self.scores[ids][:, None]

    def model(self, query, rows):
        return torch.ones(len(query.newest_B), len(ITEMS), 1)


def rank_all(batches, scores, visit=None):
    scorer = Scorer(scores)
    ranking = rank_candidates(
        scorer.model, scorer, batches, batches, torch.device("cpu"), visit
    )
    assert (ranking.skipped_users, ranking.reasons) == (0, ())
    return ranking.histogram


def by_hand(scores, candidates):
    """Those above the positive, those equal to it, and what cannot be compared come before it."""
    positive, *others = (scores[row] for row in candidates)
    return 1 + sum(not positive > other for other in others)


@pytest.mark.parametrize("kind", ["different", "tied", "equal", "nan"])
def test_ties_and_nan_count_against_the_model(ranks, dataset, kind):
    random = np.random.default_rng(5)
    scores = random.normal(size=dataset.num_embeddings)
    if kind == "tied":
        scores = np.round(scores)
    elif kind == "equal":
        scores[:] = 2.5
    elif kind == "nan":
        scores[random.random(len(scores)) < 0.3] = np.nan
    expected = np.zeros((3, 10), int)
    for _, domain, candidates in users_of(batches_of(dataset)).values():
        expected[domain, by_hand(scores, candidates) - 1] += 1
    seen = {}

    def visit(candidates, positions, scores_C):
        starts = np.cumsum(candidates.counts_B) - candidates.counts_B
        for user, rank, start in zip(
            candidates.user_B, positions[MODEL], starts, strict=True
        ):
            seen[int(user)] = int(rank), scores_C[start]

    found = rank_all(batches_of(dataset), scores, visit)
    assert found.dtype == np.int64 and found.shape == (2, 3, 10)
    np.testing.assert_array_equal(found[0], expected)
    for user, (_, _, candidates) in users_of(batches_of(dataset)).items():
        rank, score = seen[user]
        assert rank == by_hand(scores, candidates)
        np.testing.assert_array_equal(score, np.float32(scores[candidates[0]]))


@pytest.mark.parametrize(
    ("world_size", "batch_size"), [(1, 1), (1, 500), (2, 7), (3, 4), (5, 20)]
)
def test_counts_of_ranks_do_not_depend_on_how_users_are_split(
    ranks, dataset, world_size, batch_size
):
    """Each rank's counts, with a group of one process: over all of them they are summed."""
    scores = np.random.default_rng(6).normal(size=dataset.num_embeddings)
    expected = rank_all(batches_of(dataset), scores)
    parts = [
        rank_all(batches_of(dataset, "test", r, world_size, batch_size), scores)
        for r in range(world_size)
    ]
    np.testing.assert_array_equal(sum(parts), expected)
    assert (
        expected[0].sum()
        == expected[1].sum()
        == dataset.users - dataset.too_short
    )


@pytest.mark.parametrize(("world_size", "steps"), [(1, 10), (2, 5), (5, 2)])
def test_a_step_has_so_many_users_of_each_rank(
    tmp_path, histories, world_size, steps
):
    """More ranks take fewer steps."""
    even = write_dataset(
        tmp_path / "data", histories, ITEMS, cuts=(10, 20, 30, 40), streams=5
    )
    assert len(batches_of(even, batch_size=5, world_size=world_size)) == steps


def test_vocabularies_are_read_once(ranks, dataset, monkeypatch):
    """Whoever asks, and however often."""
    fresh = Dataset.load(dataset.folder)
    scores = np.random.default_rng(6).normal(size=dataset.num_embeddings)
    expected = rank_all(batches_of(fresh), scores)
    for reader in ("read_table", "ParquetFile"):
        monkeypatch.setattr(pq, reader, None)
    np.testing.assert_array_equal(rank_all(batches_of(fresh), scores), expected)
    assert read_item_counts(fresh) is read_item_counts(fresh)
    assert (
        read_item_counts(fresh).dtype == np.int32
        and not read_item_counts(fresh).flags.writeable
    )


def test_every_step_is_reported(ranks, dataset):
    batches, steps = batches_of(dataset), []
    scorer = Scorer(np.zeros(dataset.num_embeddings))
    device = torch.device("cpu")
    rank_candidates(
        scorer.model,
        scorer,
        batches,
        batches,
        device,
        advance=lambda *step: steps.append(step),
    )
    assert steps == [(step + 1, len(batches)) for step in range(len(batches))]


@pytest.fixture
def damaged(tmp_path, histories):
    """The dataset with the second block of its fourth shard spoilt (users 29 to 31), and its fifth shard gone (40 to 43)."""
    dataset = write_dataset(
        tmp_path / "data",
        histories,
        ITEMS,
        cuts=(11, 12, 26, 40, 44),
        streams=5,
    )
    spoil_block(dataset, shard=3, block=1)
    (dataset.folder / dataset.shards[4].name).unlink()
    return dataset


SKIPPED = {29, 30, 31, 40, 41, 42, 43}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (3, 0), (5, 2)]
)
def test_skipped_users_are_counted_and_the_others_ranked_as_ever(
    ranks, dataset, damaged, monkeypatch, world_size, workers
):
    """`all_reduce` stands still here, so that each rank's own part is seen."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    scores = np.random.default_rng(6).normal(size=dataset.num_embeddings)
    expected = {
        user: found
        for user, found in users_of(batches_of(dataset)).items()
        if user not in SKIPPED
    }
    histogram = np.zeros((3, 10), int)
    for _, domain, candidates in expected.values():
        histogram[domain, by_hand(scores, candidates) - 1] += 1
    assert len(expected) < dataset.users - dataset.too_short
    parts, found = [], {}
    scorer, stream = (
        Scorer(scores),
        StreamConfig(workers=workers, damaged="skip"),
    )
    for rank in range(world_size):
        batches = batches_of(
            damaged, rank=rank, world_size=world_size, stream=stream
        )
        found |= users_of(batches)
        built = batches_of_workers(batches, stream, pin_memory=False)
        parts.append(
            rank_candidates(
                scorer.model, scorer, batches, built, torch.device("cpu")
            )
        )
    assert found == expected
    np.testing.assert_array_equal(
        sum(part.histogram[0] for part in parts), histogram
    )
    assert sum(part.skipped_users for part in parts) == len(SKIPPED)
    reasons = [line for part in parts for line in part.reasons]
    assert len(reasons) == len(set(reasons)) == 3  # a sha256, a block, a file
    assert sum("users 29 to 31 are skipped" in line for line in reasons) == 1
    assert sum("users 40 to 43 are skipped" in line for line in reasons) == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_is_ranked_as_the_stream_is_configured(ranks, damaged, split):
    scorer = Scorer(np.zeros(damaged.num_embeddings))
    settings = [
        "evaluation.negatives=9",
        "evaluation.batch_size=7",
        "stream.workers=0",
    ]
    with pytest.raises(InputError, match=r"00000[34]\.tar"):
        evaluate_split(
            scorer.model,
            scorer,
            damaged,
            ranks,
            load_config([], settings),
            split,
        )
    config = load_config([], [*settings, "stream.damaged=skip"])
    ranking = evaluate_split(
        scorer.model, scorer, damaged, ranks, config, split
    )
    record = make_evaluation_record(split, damaged, ranking, step=1, epoch=0)
    assert record["skipped_users"] == len(SKIPPED)
    seen = {
        user
        for user in users_of(batches_of(damaged, split, stream=config.stream))
        if user not in SKIPPED
    }
    assert (
        sum(figures["users"] for figures in record["domains"].values())
        == len(seen)
        == ranking.histogram[0].sum()
    )


def test_checksums_are_asked_for_in_ranking_as_the_stream_is_configured(
    ranks, tmp_path, histories
):
    dataset = write_dataset(tmp_path / "data", histories, ITEMS)
    spoil_block(dataset, shard=0, block=1)
    with pytest.raises(InputError, match="sha256"):
        users_of(batches_of(dataset))
    assert (
        len(users_of(batches_of(dataset, stream=StreamConfig(verify=False))))
        == dataset.users - dataset.too_short
    )


def popularity_histogram(dataset, counts):
    expected = np.zeros((3, 10), int)
    for user, (_, domain, candidates) in users_of(batches_of(dataset)).items():
        tie = {
            row: random_unit(
                random_bits(SEED, RandomStream.POPULARITY_TIES, user, row)
            )
            for row in candidates
        }
        order = sorted(candidates, key=lambda row: (-counts[row], -tie[row]))
        expected[domain, order.index(candidates[0])] += 1
    return expected


def test_popularity_ranks_by_training_counts(ranks, dataset, histories):
    counts = np.zeros(dataset.num_embeddings)
    for history in histories:
        np.add.at(counts, history[:-2] if len(history) >= 3 else history, 1)
    found = rank_all(batches_of(dataset), np.zeros(dataset.num_embeddings))[1]
    np.testing.assert_array_equal(found, popularity_histogram(dataset, counts))


def test_equally_popular_items_are_in_a_fair_order(ranks, tmp_path):
    """Every training count is 0: the held-out item is at each of five places equally often, not last."""
    histories = [[user % 40, 0, user % 35] for user in range(1500)]
    made = write_dataset(tmp_path / "data", histories, (40, 3))
    for domain in made.domains:
        table = pq.read_table(made.folder / domain.vocabulary)
        zeros = table.set_column(2, "count", [[0] * len(table)])
        pq.write_table(zeros, made.folder / domain.vocabulary)
    found = rank_all(
        batches_of(made, negatives=4, batch_size=300),
        np.zeros(made.num_embeddings),
    )
    assert found[0, 0].tolist() == [0, 0, 0, 0, 1500]
    assert abs(found[1, 0] - 300).max() < 5 * math.sqrt(240)


def test_longer_given_lists_widen_the_counts(ranks, dataset, histories):
    user = next(
        user for user, history in enumerate(histories) if len(history) >= 3
    )
    given_rows = {user: (0, np.arange(25))}
    scores = -np.arange(dataset.num_embeddings, dtype=float)
    found = rank_all(batches_of(dataset, given=given_rows), -scores)
    assert (
        found.shape == (2, 3, 25)
        and found[0].sum() == 1
        and found[0, 0, 24] == 1
    )
    assert rank_all(batches_of(dataset, given={}), scores).sum() == 0


def test_the_mean_is_over_domains_that_have_users(dataset):
    histogram = np.zeros((2, 3, 10), np.int64)
    histogram[0, 0, 0], histogram[0, 2, 9] = 4, 2  # always first; always tenth
    histogram[1, 0, 1], histogram[1, 2, 1] = 4, 2
    record = make_evaluation_record(
        "validation", dataset, PositionCounts(histogram, 5), step=30, epoch=2
    )
    assert (record["kind"], record["step"], record["epoch"]) == (
        "validation",
        30,
        2,
    )
    assert (
        record["too_short"] == dataset.too_short > 0
        and record["skipped_users"] == 5
    )
    names = [domain.name for domain in dataset.domains]
    assert list(record["domains"]) == list(record["popularity"]) == names
    assert record["domains"][names[1]] == {"users": 0} | dict.fromkeys(METRICS)
    assert record["domains"][names[2]]["users"] == 2
    assert record["mean"] == pytest.approx(
        {
            "HR@5": 0.5,
            "HR@10": 1.0,
            "NDCG@5": 0.5,
            "NDCG@10": (1 + 1 / math.log2(11)) / 2,
            "MRR": 0.55,
        }
    )
    assert record["popularity_mean"]["MRR"] == pytest.approx(0.5)


def test_small_domains_are_shown_and_do_not_count(dataset):
    histogram = np.zeros((2, 3, 10), np.int64)
    histogram[:, 0, 0], histogram[:, 2, 9] = 4, 2
    ranking = PositionCounts(histogram)
    names = [domain.name for domain in dataset.domains]
    record = make_evaluation_record("test", dataset, ranking, min_users=3)
    assert record["domains"][names[2]]["users"] == 2
    assert record["mean_domains"] == [names[0]] and record["min_users"] == 3
    for key in ("mean", "popularity_mean"):
        assert record[key]["MRR"] == 1
    for key in ("user_mean", "popularity_user_mean"):
        assert record[key]["MRR"] == pytest.approx((4 + 0.2) / 6)
    record = make_evaluation_record("test", dataset, ranking, min_users=5)
    assert record["mean_domains"] == [names[0], names[2]]
    assert record["mean"]["MRR"] == pytest.approx(0.55)
    record = make_evaluation_record(
        "test", dataset, ranking, min_users=3, mean_domains=[names[2]]
    )
    assert record["mean"]["MRR"] == pytest.approx(0.1)


def test_no_user_at_all_has_no_mean(dataset):
    record = make_evaluation_record(
        "test", dataset, PositionCounts(np.zeros((2, 3, 10), np.int64))
    )
    assert record["mean"] == record["popularity_mean"] == dict.fromkeys(METRICS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("negatives", 0),
        ("batch_size", 0),
        ("every_epochs", 0),
        ("min_users", 0),
        ("patience", -1),
    ],
)
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"evaluation\.{key} is {value}"):
        EvaluationConfig(**{key: value})
