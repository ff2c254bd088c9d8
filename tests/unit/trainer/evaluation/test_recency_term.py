"""The recency term: its features, and weights that a slow optimiser finds too."""

import dataclasses

import numpy as np
import pytest
import torch

from embeddings.config import TableConfig
from embeddings.table import ItemTable
from tests.helpers.made import write_dataset
from trainer.config.load import load_config
from trainer.data.loading.day_counts import count_recent
from trainer.evaluation.evaluation import MODEL
from trainer.evaluation.full import HeldOutBatches, full_record, rank_fully
from trainer.evaluation.metrics import candidate_positions
from trainer.evaluation.recency.fit import TermFit, fit_recency_term
from trainer.evaluation.recency.full_term import FullTermRanking
from trainer.evaluation.recency.ranking import HalfLifeChoice, RecencyPopularity
from trainer.evaluation.recency.term import (
    OFFSET,
    TERM_HALF_LIVES,
    CandidateLists,
    RecencyFeatures,
    RecencyTerm,
    fit_weights,
)
from trainer.evaluation.sampled import (
    RankingBatches,
    evaluate_split,
    make_evaluation_record,
)

ITEMS = (30, 12, 8)
SEED = 3


def drawn_lists(users=300, seed=0):
    """Users who choose by planted weights among 2 to 9 candidates; the chosen one comes first."""
    random = np.random.default_rng(seed)
    planted = np.array([1.3, -0.4, 2.0])
    lists = []
    for _ in range(users):
        x = random.normal(size=(random.integers(2, 10), 3)) * [1, 5, 0.2]
        noise = random.gumbel(size=len(x))
        chosen = int(np.argmax(x @ (planted / [1, 5, 0.2]) + noise))
        lists.append(
            np.concatenate([x[chosen : chosen + 1], np.delete(x, chosen, 0)])
        )
    return lists, planted / [1, 5, 0.2]


def jagged(lists):
    return CandidateLists(
        np.concatenate(lists), np.array([len(x) for x in lists])
    )


def by_torch(lists, spread):
    """The same maximum by a general optimiser, list after list."""
    inputs = [torch.from_numpy((x - x.mean(0)) / spread) for x in lists]
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight],
        max_iter=500,
        tolerance_grad=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = sum(-torch.log_softmax(x @ weight, 0)[0] for x in inputs)
        loss = loss + 0.5 * (weight**2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach().numpy() / spread


def test_weights_are_those_of_a_slow_optimiser(ranks):
    lists, planted = drawn_lists()
    found = fit_weights(jagged(lists), len(lists))
    spread = np.sqrt(np.mean([x.var(0) for x in lists], axis=0))
    np.testing.assert_allclose(found, by_torch(lists, spread), rtol=1e-5)
    np.testing.assert_allclose(found, planted, rtol=0.35)


def test_the_order_of_users_does_not_change_a_bit(ranks):
    lists, _ = drawn_lists(80)
    one = fit_weights(jagged(lists), 80)
    other = fit_weights(jagged(lists[::-1]), 80)
    assert one.tolist() == other.tolist()


def test_what_is_the_same_for_all_candidates_has_no_weight(ranks):
    lists, _ = drawn_lists(50)
    for x in lists:
        x[:, 1] = 7
    assert fit_weights(jagged(lists), 50)[1] == 0


def test_a_feature_that_tells_all_keeps_a_finite_weight(ranks):
    lists = [np.array([[1.0, 0, 0], [0, 0, 0]]) for _ in range(40)]
    weights = fit_weights(jagged(lists), 40)
    assert 1 < weights[0] < 50 and np.isfinite(weights).all()


class Scores:
    """Stands for table and model: a row's score is a number that says nothing."""

    def __call__(self, ids):
        return torch.sin(ids.float())[:, None]

    def model(self, query, rows):
        return torch.ones(len(query.newest_B), len(ITEMS), 1)


@pytest.fixture(scope="module")
def histories():
    """Each of ten days has its own item of every domain, which users take on the day after, too."""
    random = np.random.default_rng(0)
    starts = np.array([0, 33, 48])
    histories = []
    ticks = []
    for _ in range(240):
        days = np.sort(random.integers(0, 100, 6))
        domain = random.integers(0, 3, 6)
        item = (days // 10) % np.array(ITEMS)[domain]
        histories.append(starts[domain] + item)
        ticks.append((days * 655 + 300).astype(np.uint16))
    return histories, ticks


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories):
    items, ticks = histories
    return write_dataset(
        tmp_path_factory.mktemp("term") / "data",
        items,
        ITEMS,
        cuts=(50, 120),
        streams=3,
        ticks=ticks,
    )


def configured(dataset, *settings):
    return load_config(
        [],
        [
            f"data={dataset.folder}",
            "stream.workers=0",
            "evaluation.batch_size=32",
            "evaluation.negatives=5",
            f"seed={SEED}",
            *settings,
        ],
    )


def test_features_are_logarithms_of_counts_of_the_days_before(ranks, dataset):
    config = configured(dataset)
    counts = count_recent(dataset, ranks, config.stream)
    features = RecencyFeatures(counts)
    batches = RankingBatches(
        dataset, 0, 1, config.evaluation, 100, "test", SEED, None, config.stream
    )
    for batch in batches:
        score_C = np.sin(batch.rows_C)
        x_CK = features.inputs(
            batch.now_B, batch.counts_B, batch.rows_C, score_C
        )
        np.testing.assert_array_equal(x_CK[:, 0], score_C)
        x_CJ = x_CK[:, 1:]
        assert x_CJ.shape == (len(batch.rows_C), len(TERM_HALF_LIVES))
        day_C = np.repeat(counts.days.of_ticks(batch.now_B), batch.counts_B)
        for j, half_life in enumerate(TERM_HALF_LIVES):
            newest = counts.newest_before(batch.rows_C, day_C)
            expected = np.log(counts.fade(half_life).at(newest) + OFFSET)
            np.testing.assert_array_equal(x_CJ[:, j], expected)
        assert (np.diff(x_CJ) >= -1e-6).all()  # longer half-lives count more


def test_where_the_past_says_all_the_term_ranks_first(ranks, dataset):
    """Beside a model that knows nothing; its weights are in the record, by domain."""
    config = configured(dataset, "evaluation.min_users=30")
    scores = Scores()
    counts = count_recent(dataset, ranks, config.stream)
    term = fit_recency_term(
        scores.model, scores, dataset, ranks, config, counts
    )
    ranking = evaluate_split(
        scores.model, scores, dataset, ranks, config, "test", term=term
    )
    record = make_evaluation_record("test", dataset, ranking, step=1, epoch=1)
    assert record["with_recency_mean"]["NDCG@10"] > 0.9
    assert record["mean"]["NDCG@10"] < 0.7
    assert list(record["recency_term"]["domains"]) == list(record["domains"])
    for fitted in record["recency_term"]["domains"].values():
        assert fitted["users"] >= 30
        assert len(fitted["weights"]) == len(TERM_HALF_LIVES)
        assert fitted["weights"][0] > 1
    assert record["recency_term"]["half_lives"][-1] == "all"
    assert "recency_choice" not in record


def test_a_domain_of_few_users_is_ranked_as_by_the_model(ranks, dataset):
    config = configured(dataset, "evaluation.min_users=10000")
    scores = Scores()
    counts = count_recent(dataset, ranks, config.stream)
    term = fit_recency_term(
        scores.model, scores, dataset, ranks, config, counts
    )
    assert term.users_D.tolist() == [0, 0, 0]
    ranking = evaluate_split(
        scores.model, scores, dataset, ranks, config, "test", term=term
    )
    _, _, with_term = ranking.histogram
    np.testing.assert_array_equal(with_term, ranking.histogram[0])


def test_parts_of_the_users_together_fit_what_all_do(ranks, dataset):
    """What ranks keep, in other steps and another order."""
    config = configured(dataset, "evaluation.min_users=1")
    counts = count_recent(dataset, ranks, config.stream)
    weights = []
    for world_size, batch_size in ((1, 32), (3, 5)):
        fit = TermFit(dataset, config, counts)
        evaluation = dataclasses.replace(
            config.evaluation, batch_size=batch_size
        )
        for rank in range(world_size):
            for batch in RankingBatches(
                dataset,
                rank,
                world_size,
                evaluation,
                100,
                "validation",
                SEED,
                None,
                config.stream,
            ):
                score_C = np.sin(batch.rows_C).astype(np.float32)
                position_B = candidate_positions(score_C, batch.counts_B)
                fit.visit(batch, {MODEL: position_B}, score_C)
        weights.append(fit.fit().weight_DK.tolist())
    assert weights[0] == weights[1]


def test_scores_that_are_no_numbers_do_not_weigh(ranks, dataset):
    config = configured(dataset, "evaluation.min_users=1")
    counts = count_recent(dataset, ranks, config.stream)
    fit = TermFit(dataset, config, counts)
    for batch in RankingBatches(
        dataset,
        0,
        1,
        config.evaluation,
        100,
        "validation",
        SEED,
        None,
        config.stream,
    ):
        score_C = np.full(len(batch.rows_C), np.nan, np.float32)
        fit.visit(batch, {MODEL: batch.user_B}, score_C)
    assert fit.fit().users_D.tolist() == [0, 0, 0]


def test_a_users_share_is_drawn_where_there_are_many(
    ranks, dataset, monkeypatch
):
    monkeypatch.setattr("trainer.evaluation.recency.fit._MOST_USERS", 60)
    config = configured(dataset, "evaluation.min_users=1")
    scores = Scores()
    counts = count_recent(dataset, ranks, config.stream)
    term = fit_recency_term(
        scores.model, scores, dataset, ranks, config, counts
    )
    assert 30 < term.users_D.sum() < 100


def test_among_all_items_the_term_ranks_as_a_loop_would(ranks, dataset):
    """Score and bias of every item of the domain on the user's day, without the user's other items."""
    config = configured(dataset, "evaluation.min_users=30")
    counts = count_recent(dataset, ranks, config.stream)
    features = RecencyFeatures(counts)
    random = np.random.default_rng(1)
    weights = random.normal(size=(3, 1 + len(TERM_HALF_LIVES)))
    term = RecencyTerm(features, weights, np.full(3, 9))
    table = ItemTable(
        dataset.num_embeddings, 8, TableConfig(optimizer="sgd"), 7, "cpu"
    )
    vectors = table(torch.arange(dataset.num_embeddings)).detach().numpy()
    full = FullTermRanking(table, dataset, term)
    held = list(
        HeldOutBatches(dataset, 0, 1, config.evaluation, 100, "test", SEED)
    )
    users = []
    for batch in held:
        y_BDR = torch.from_numpy(
            random.normal(size=(len(batch.user_B), 3, 8)).astype(np.float32)
        )
        users.append(y_BDR.numpy())
        full.add(
            y_BDR,
            batch.domain_B,
            batch.row_B,
            batch.now_B,
            batch.counts_B,
            batch.rows_E,
        )
    checked = 0
    for batch, y_BDR, position_B in zip(
        held, users, full.positions(), strict=True
    ):
        ends = np.cumsum(batch.counts_B)
        day_B = counts.days.of_ticks(batch.now_B)
        for place, number in enumerate(batch.domain_B):
            domain = dataset.domains[number]
            rows = np.arange(domain.start, domain.start + domain.items)
            x = features.of(rows, np.full(len(rows), day_B[place]))
            score = weights[number, 0] * (vectors[rows] @ y_BDR[place, number])
            score += x @ weights[number, 1:]
            others = batch.rows_E[
                ends[place] - batch.counts_B[place] : ends[place]
            ]
            own = batch.row_B[place]
            rivals = ~np.isin(rows, others) & (rows != own)
            expected = 1 + np.count_nonzero(
                score[rivals] > score[rows == own][0] + 1e-4
            )
            most = 1 + np.count_nonzero(
                score[rivals] >= score[rows == own][0] - 1e-4
            )
            assert expected <= position_B[place] <= most
            checked += expected == most
    assert checked > 100


def test_a_full_ranking_has_the_term_beside_the_model(ranks, dataset):
    config = configured(dataset, "evaluation.min_users=30")
    counts = count_recent(dataset, ranks, config.stream)
    table = ItemTable(
        dataset.num_embeddings, 8, TableConfig(optimizer="sgd"), 7, "cpu"
    )

    def model(query, rows):
        return torch.ones(len(query.newest_B), len(ITEMS), 8)

    term = fit_recency_term(model, table, dataset, ranks, config, counts)
    recency = RecencyPopularity(counts, HalfLifeChoice(3, "days", {}), SEED)
    ranking = rank_fully(
        model, table, dataset, ranks, config, "test", recency=recency, term=term
    )
    record = full_record("test", dataset, ranking, step=1, epoch=1)
    assert list(record["recency_term"]["domains"]) == list(record["domains"])
    assert record["with_recency_mean"]["NDCG@10"] > 0.8
    assert record["recency_mean"]["NDCG@10"] > 0.8
    assert record["mean"]["NDCG@10"] < 0.5
    assert record["recency_difference"]["mean"]["value"] < 0
    head = record["breakdown"]["domain 0"]["item popularity"]["head"]
    assert head["with_recency NDCG@10"] > head["NDCG@10"]
