"""Whose events a split by time ranks, after which history, among which items: against loops."""

import numpy as np
import pytest
import torch

from embeddings.config import TableConfig
from embeddings.table import ItemTable
from tests.helpers.made import draw_histories, draw_ticks, write_dataset
from trainer.config.evaluation import EvaluationConfig
from trainer.config.load import load_config
from trainer.config.stream import StreamConfig
from trainer.data.loading.day_counts import count_recent
from trainer.data.loading.timeline import describe_split, split_dataset
from trainer.evaluation.evaluation import Evaluation
from trainer.evaluation.full import HeldOutBatches, full_record, rank_fully
from trainer.evaluation.popularity import Popularity
from trainer.evaluation.recency.ranking import (
    FullRecencyRanking,
    HalfLifeChoice,
    RecencyPopularity,
)
from trainer.evaluation.sampled import (
    RankingBatches,
    evaluate_split,
    make_evaluation_record,
)
from trainer.evaluation.targets import highest_target, users_of_targets
from trainer.reporting.console import evaluation_table, split_sentences
from trainer.reporting.full_ranking_tables import full_tables

ITEMS, STARTS = (30, 12, 8), (0, 33, 48)
LATE = (3, 17, 34, 49)
WHOSE = ("first", "newest", "all")
PARTS = ("validation", "test")
DIM = 8


@pytest.fixture(scope="module")
def histories():
    """Some items come late: training knows nothing of them."""
    histories = draw_histories(50, ITEMS, longest=12)
    for items, times in zip(histories, draw_ticks(histories), strict=True):
        items[np.isin(items, LATE) & (times < 30_000)] += 1
    return histories


@pytest.fixture(scope="module")
def plain(tmp_path_factory, histories):
    return write_dataset(
        tmp_path_factory.mktemp("targets") / "data",
        histories,
        ITEMS,
        cuts=(11, 12, 26, 40, 44),
        streams=5,
    )


@pytest.fixture(params=WHOSE)
def dataset(request, plain, ranks):
    return timeline(plain, ranks, request.param)


def timeline(plain, ranks, whose, counts="cut"):
    config = load_config(
        [],
        [
            "split.kind=timeline",
            "split.validation=0.25",
            "split.test=0.3",
            f"split.whose={whose}",
            f"split.counts={counts}",
        ],
    )
    return split_dataset(plain, config, ranks)


def expected_targets(histories, split, part):
    """{(user, place)} by loops."""
    found = set()
    for user, times in enumerate(draw_ticks(histories)):
        if part == "validation":
            first, end = split.validation_tick, split.test_tick
        else:
            first, end = split.test_tick, 1 << 16
        places = [
            place for place, tick in enumerate(times) if first <= tick < end
        ]
        chosen = {"first": places[:1], "newest": places[-1:], "all": places}
        found |= {(user, place) for place in chosen[split.whose] if place}
    return found


def batches_of(kind, dataset, part, rank=0, world_size=1, domain="", size=7):
    return kind(
        dataset,
        rank,
        world_size,
        EvaluationConfig(negatives=9, batch_size=size),
        100,
        part,
        3,
        stream=StreamConfig(domain=domain),
    )


def history_of(query, place):
    tokens = query.cross
    inputs = tokens.input_M[tokens.sequence_M == place]
    return query.ids.numpy()[inputs[inputs > 0].numpy() - 1].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("part", PARTS)
def test_targets_are_ranked_after_all_that_is_before_them(
    dataset, histories, part, world_size
):
    """Once each, on any number of ranks, which all have the same number of batches."""
    found = []
    numbers = []
    steps = []
    for rank in range(world_size):
        batches = batches_of(RankingBatches, dataset, part, rank, world_size)
        steps.append(len(batches))
        built = list(batches)
        assert len(built) == len(batches)
        for candidates in built:
            ends_B = np.cumsum(candidates.counts_B)
            for index, user in enumerate(candidates.user_B.tolist()):
                if user < 0:
                    continue
                history = history_of(candidates.query, index)
                place = len(history)
                own = histories[user].tolist()
                assert history == own[:place]
                begin = ends_B[index] - candidates.counts_B[index]
                rows = candidates.rows_C[begin : ends_B[index]].tolist()
                assert rows[0] == own[place]
                assert not set(rows[1:]) & set(own)
                assert dataset.item_counts[rows[1:]].all()
                found.append((user, place))
            real = candidates.user_B >= 0
            numbers += candidates.number_B[real].tolist()
    assert len(set(steps)) == 1
    expected = expected_targets(histories, dataset.split, part)
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(set(numbers)) == len(numbers)
    users = users_of_targets(dataset, part, np.array(numbers))
    assert users.tolist() == [user for user, _ in found]
    assert max(numbers) < highest_target(dataset, part)
    in_order = [pair for _, pair in sorted(zip(numbers, found, strict=True))]
    assert in_order == sorted(found)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("domain", ["", "domain 1"])
def test_among_all_items_the_same_targets_are_ranked(
    dataset, histories, part, domain
):
    found = set()
    for batch in batches_of(HeldOutBatches, dataset, part, domain=domain):
        others = np.split(batch.rows_E, np.cumsum(batch.counts_B)[:-1])
        for index, user in enumerate(batch.user_B.tolist()):
            own = histories[user].tolist()
            place = int(batch.length_B[index])
            assert batch.row_B[index] == own[place]
            assert sorted(others[index].tolist()) == sorted(
                own[:place] + own[place + 1 :]
            )
            found.add((user, place))
    expected = expected_targets(histories, dataset.split, part)
    if domain:
        expected = {
            (user, place)
            for user, place in expected
            if STARTS[1] <= histories[user][place] < STARTS[2]
        }
    assert found == expected


class Scorer:
    """Stands for table and model: the score of a candidate is what `scores` says of its row."""

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores, dtype=torch.float32)

    def __call__(self, ids):
        return self.scores[ids][:, None]

    def model(self, query, rows):
        return torch.ones(len(query.newest_B), len(ITEMS), 1)


def configured():
    settings = [
        "evaluation.negatives=9",
        "evaluation.batch_size=7",
        "stream.workers=0",
    ]
    return load_config([], settings)


def evaluated(dataset, ranks, part):
    random = np.random.default_rng(5)
    scorer = Scorer(random.permutation(dataset.num_embeddings))
    ranking = evaluate_split(
        scorer.model, scorer, dataset, ranks, configured(), part
    )
    return make_evaluation_record(part, dataset, ranking, step=1, epoch=0)


@pytest.mark.parametrize("part", PARTS)
def test_a_record_names_the_split_and_the_items_never_seen(
    dataset, histories, ranks, part
):
    record = evaluated(dataset, ranks, part)
    expected = expected_targets(histories, dataset.split, part)
    counts = {True: {}, False: {}}
    for domain in dataset.domains:
        counts[True][domain.name] = 0
        counts[False][domain.name] = 0
    for user, place in expected:
        row = histories[user][place]
        is_seen = bool(dataset.item_counts[row])
        counts[is_seen][domain_name(row)] += 1
    assert sum(counts[True].values()) and sum(counts[False].values())
    assert users_of(record["domains"]) == counts[True]
    assert users_of(record["unseen"]["model"]) == counts[False]
    assert users_of(record["unseen"]["popularity"]) == counts[False]
    items = dataset.item_counts[STARTS[0] : STARTS[0] + ITEMS[0]]
    assert record["unseen"]["items"]["domain 0"] == (items == 0).sum()
    cuts = describe_split(dataset)
    split = record["split"]
    assert {name: split[name] for name in ("kind", "whose", "test")} == {
        name: cuts[name] for name in ("kind", "whose", "test")
    }
    assert split["without_history"] == dataset.training.without_history[part]
    assert "too_short" not in record
    evaluation = Evaluation.from_record(record)
    assert evaluation.to_record() == record
    sentences = split_sentences(evaluation)
    assert cuts["validation"] in sentences[0] and cuts["test"] in sentences[0]
    assert str(evaluation_table(record).caption).startswith(sentences[0])


def domain_name(row):
    return f"domain {np.searchsorted(STARTS, row, 'right') - 1}"


def users_of(figures):
    return {name: of_domain["users"] for name, of_domain in figures.items()}


class Ones(torch.nn.Module):
    """Every user's vector is of ones."""

    def forward(self, query, rows):
        return torch.ones(len(query.newest_B), len(ITEMS), DIM)


@pytest.mark.parametrize("part", PARTS)
def test_a_full_ranking_has_each_target_and_those_of_items_seen(
    dataset, histories, ranks, part
):
    config = TableConfig(optimizer="sgd", init_std=0.5)
    table = ItemTable(dataset.num_embeddings, DIM, config, 7, "cpu")
    ranking = rank_fully(Ones(), table, dataset, ranks, configured(), part)
    record = full_record(part, dataset, ranking, step=1, epoch=0)
    expected = sorted(expected_targets(histories, dataset.split, part))
    (numbers,) = np.nonzero(ranking.rank_U)
    users = users_of_targets(dataset, part, numbers)
    assert users.tolist() == [user for user, _ in expected]
    score_N = table(torch.arange(dataset.num_embeddings)).detach().sum(1)
    for number, (user, place) in zip(numbers, expected, strict=True):
        own = histories[user].tolist()
        target = own[place]
        domain = int(np.searchsorted(STARTS, target, "right")) - 1
        others = own[:place] + own[place + 1 :]
        rivals = set(range(STARTS[domain], STARTS[domain] + ITEMS[domain]))
        rivals -= {target, *others}
        rivals = {row for row in rivals if dataset.item_counts[row]}
        position = 1 + sum(score_N[row] >= score_N[target] for row in rivals)
        assert ranking.rank_U[number] == position
    unseen = users_of(record["unseen"]["model"])
    assert sum(unseen.values()) + sum(
        users_of(record["domains"]).values()
    ) == len(expected)
    for name, breakdown in record["breakdown"].items():
        for groups in breakdown.values():
            users = sum(users_of(groups).values())
            assert users == record["domains"][name]["users"]
    sampled = evaluated(dataset, ranks, part)
    assert users_of(sampled["unseen"]["model"]) == unseen
    for name, spread in record["recommended"].items():
        domain = next(d for d in dataset.domains if d.name == name)
        rows = np.arange(domain.start, domain.start + domain.items)
        assert spread["items"] == dataset.is_trained(rows).sum()
    shown_N = ranking.shown[dataset.item_counts == 0]
    assert not shown_N.any()
    assert Evaluation.from_record(record).to_record() == record
    caption = str(full_tables(record)[0].caption)
    assert "Split by time: trained on what is before" in caption


@pytest.mark.parametrize("part", PARTS)
def test_what_ranks_beside_the_model_ranks_items_seen_alone(
    dataset, histories, ranks, part
):
    """Popularity and recency popularity, against loops, with ties in any order."""
    config = configured()
    popularity = Popularity(dataset, config.seed)
    counts = count_recent(dataset, ranks, config.stream)
    chosen = HalfLifeChoice(7, counts.days.unit, {})
    recency = RecencyPopularity(counts, chosen, config.seed)
    full = FullRecencyRanking(recency, dataset)
    batches = list(batches_of(HeldOutBatches, dataset, part))
    found = []
    for batch in batches:
        jagged = (batch.counts_B, batch.rows_E)
        users = (batch.user_B, batch.domain_B, batch.row_B)
        found.append([popularity.positions(*users, *jagged)])
        full.add(*users, batch.now_B, *jagged)
    for positions, recent_B in zip(found, full.positions(), strict=True):
        positions.append(recent_B)
    unseen = 0
    for batch, positions in zip(batches, found, strict=True):
        day_B = counts.days.of_ticks(batch.now_B)
        for index, user in enumerate(batch.user_B.tolist()):
            row = batch.row_B[index]
            start = STARTS[batch.domain_B[index]]
            rows = np.arange(start, start + ITEMS[batch.domain_B[index]])
            others = np.isin(rows, histories[user])
            rivals = rows[~others & (dataset.item_counts[rows] > 0)]
            days = np.full(len(rivals), day_B[index])
            scores = (
                (dataset.item_counts[row], dataset.item_counts[rivals]),
                (
                    recency.count(row[None], day_B[index, None])[0],
                    recency.count(rivals, days),
                ),
            )
            for (own, of_rivals), position_B in zip(
                scores, positions, strict=True
            ):
                least = 1 + (of_rivals > own).sum()
                most = 1 + (of_rivals >= own).sum()
                assert least <= position_B[index] <= most
            unseen += dataset.item_counts[row] == 0
    assert unseen


@pytest.mark.parametrize("kind", [RankingBatches, HeldOutBatches])
@pytest.mark.parametrize("part", PARTS)
def test_the_recent_past_is_that_of_the_cut_or_of_each_event(
    plain, ranks, histories, part, kind
):
    ticks = draw_ticks(histories)
    for counts in ("cut", "day"):
        dataset = timeline(plain, ranks, "all", counts)
        cut = dataset.split.test_tick
        if part == "validation":
            cut = dataset.split.validation_tick
        found = 0
        for batch in batches_of(kind, dataset, part):
            for index, user in enumerate(batch.user_B.tolist()):
                if user < 0:
                    continue
                if kind is RankingBatches:
                    place = len(history_of(batch.query, index))
                else:
                    place = int(batch.length_B[index])
                own = int(ticks[user][place])
                expected = own if counts == "day" else cut
                assert batch.now_B[index] == expected <= own
                found += 1
        assert found
