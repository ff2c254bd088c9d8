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


@pytest.mark.parametrize(
    "record", [SAMPLED, FULL, BARE], ids=["sampled", "full", "bare"]
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
