"""An evaluation and its record."""

import sys

import pytest

from trainer.evaluation.evaluation import Evaluation
from trainer.evaluation.metrics import METRICS

SAMPLED = {
    "kind": "test",
    "too_short": 3,
    "skipped_users": 1,
    "step": 30,
    "epoch": 2,
    "domains": {
        "Books": {"users": 4} | dict.fromkeys(METRICS, 0.5),
        "Toys": {"users": 0} | dict.fromkeys(METRICS),
    },
    "mean": dict.fromkeys(METRICS, 0.5),
    "popularity": {
        "Books": {"users": 4} | dict.fromkeys(METRICS, 0.25),
        "Toys": {"users": 0} | dict.fromkeys(METRICS),
    },
    "popularity_mean": dict.fromkeys(METRICS, 0.25),
}
FULL = {
    "kind": "test",
    "ranking": "full",
    **{key: value for key, value in SAMPLED.items() if key != "kind"},
    "difference": {"metric": "NDCG@10"},
    "breakdown": {},
    "recommended": {},
    "sampled": SAMPLED,
}
BARE = {"kind": "validation", "step": 1, "domains": {}, "mean": {}}


WITH_MEANS = {
    "kind": "test",
    "domains": {
        "Books": {"users": 60} | dict.fromkeys(METRICS, 0.5),
        "Toys": {"users": 20} | dict.fromkeys(METRICS, 0.1),
    },
    "mean": dict.fromkeys(METRICS, 0.5),
    "mean_domains": ["Books"],
    "min_users": 50,
    "user_mean": dict.fromkeys(METRICS, 0.4),
    "popularity": {
        "Books": {"users": 60} | dict.fromkeys(METRICS, 0.25),
        "Toys": {"users": 20} | dict.fromkeys(METRICS, 0.25),
    },
    "popularity_mean": dict.fromkeys(METRICS, 0.25),
    "popularity_user_mean": dict.fromkeys(METRICS, 0.25),
}


WITH_RECENCY = {
    **WITH_MEANS,
    "recency": {
        "Books": {"users": 60} | dict.fromkeys(METRICS, 0.4),
        "Toys": {"users": 20} | dict.fromkeys(METRICS, 0.2),
    },
    "recency_mean": dict.fromkeys(METRICS, 0.4),
    "recency_user_mean": dict.fromkeys(METRICS, 0.35),
    "with_recency": WITH_MEANS["domains"],
    "with_recency_mean": dict.fromkeys(METRICS, 0.6),
    "recency_choice": {"half_life": 30, "unit": "days", "validation": {}},
    "recency_term": {"half_lives": [7, "all"], "offset": 0.05, "domains": {}},
}


@pytest.mark.parametrize(
    "record",
    [SAMPLED, FULL, BARE, WITH_MEANS, WITH_RECENCY],
    ids=["sampled", "full", "bare", "with means", "with recency"],
)
def test_a_record_is_read_and_given_as_it_was(record):
    given = Evaluation.from_record(record).to_record()
    assert given == record and list(given) == list(record)


def test_domains_are_rows_with_both_systems():
    evaluation = Evaluation.from_record(SAMPLED)
    books, toys = evaluation.by_domain
    assert (books.name, books.users, books.headline) == ("Books", 4, 0.5)
    assert books.popularity_headline == 0.25 and toys.headline is None
    assert evaluation.users == 4 and evaluation.step == 30
    assert (
        evaluation.mean_ndcg == 0.5 and evaluation.popularity_mean_ndcg == 0.25
    )
    assert evaluation.metrics == list(METRICS)
    assert evaluation.figures_of("Books") is books
    assert evaluation.figures_of("Moon").users == 0


def test_both_means_and_the_domains_that_count_are_told():
    evaluation = Evaluation.from_record(WITH_MEANS)
    assert evaluation.users_by_domain == {"Books": 60, "Toys": 20}
    assert evaluation.mean_domains == ["Books"]
    assert evaluation.small_domains == {"Toys": 20}
    assert (evaluation.mean_ndcg, evaluation.user_mean_ndcg) == (0.5, 0.4)
    assert not evaluation.all_are_small


def test_a_record_of_before_has_both_means_too():
    evaluation = Evaluation.from_record(SAMPLED)
    assert evaluation.mean_domains == ["Books"]
    assert evaluation.small_domains == {} and not evaluation.all_are_small
    assert evaluation.user_mean_ndcg == 0.5
    assert evaluation.popularity_user_mean["MRR"] == 0.25
    old = {
        key: value
        for key, value in WITH_MEANS.items()
        if key in ("kind", "domains", "mean")
    }
    evaluation = Evaluation.from_record(old)
    assert evaluation.user_mean_ndcg == pytest.approx(0.4)
    assert evaluation.popularity_user_mean is None
    assert evaluation.mean_domains == ["Books", "Toys"]


def test_recency_stands_beside_popularity():
    evaluation = Evaluation.from_record(WITH_RECENCY)
    assert evaluation.has_recency and evaluation.model_state == {}
    books, toys = evaluation.by_domain
    assert (books.recency_headline, toys.recency_headline) == (0.4, 0.2)
    assert books.with_recency_headline == 0.5
    assert evaluation.recency_mean_ndcg == 0.4
    assert evaluation.compared_user_mean("recency")["MRR"] == 0.35
    # Not recorded: from the domains.
    over_users = evaluation.compared_user_mean("with_recency")
    assert over_users["MRR"] == pytest.approx(0.4)
    means, user_means = evaluation.mean_rows("mean", "over users")
    assert means.compared("with_recency")["MRR"] == 0.6
    assert user_means.compared("popularity")["MRR"] == 0.25
    before = Evaluation.from_record(SAMPLED)
    assert not before.has_recency and before.recency_mean_ndcg is None
    assert before.mean_rows("a", "b")[0].recency == {}
    rows = evaluation.by_domain.to_arrow().to_pylist()
    assert [row["system"] for row in rows[:4]] == [
        "model",
        "popularity",
        "recency",
        "with_recency",
    ]


def test_where_no_domain_is_large_enough_it_is_known():
    small = WITH_MEANS | {"min_users": 61, "mean_domains": ["Books", "Toys"]}
    evaluation = Evaluation.from_record(small)
    assert evaluation.all_are_small and evaluation.small_domains == {}


def test_without_pandas_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="by_domain"):
        Evaluation.from_record(SAMPLED).to_pandas()


def test_a_table_has_a_row_for_each_domain_and_system():
    pandas = pytest.importorskip("pandas")
    table = Evaluation.from_record(SAMPLED).to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == ["domain", "system", "users", *METRICS]
    assert table[["domain", "system"]].values.tolist() == [
        ["Books", "model"],
        ["Books", "popularity"],
        ["Toys", "model"],
        ["Toys", "popularity"],
    ]
