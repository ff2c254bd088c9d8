"""Numbers, names and columns on the console."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.console import (
    escape_name,
    evaluation_table,
    format_duration,
    format_number,
    format_ratio,
    mean_sentence,
    split_sentences,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.9, "0:00:59"),
        (3661, "1:01:01"),
        (180_000, "2d 2:00:00"),
    ],
)
def test_a_duration_has_days_from_one_day_on(seconds, text):
    assert format_duration(seconds) == text


def test_what_there_is_not_is_a_dash():
    assert format_number(None) == "–" and format_number(0.25) == "0.2500"
    assert (
        format_ratio(1.0, None)
        == format_ratio(None, 1.0)
        == format_ratio(1.0, 0)
        == "–"
    )
    assert format_ratio(0.5, 0.25) == "×2.00"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("Books", "Books"), ("a\nb\x1b", "a�b�"), ("", "(no name)")],
)
def test_a_name_stays_on_one_line(name, shown):
    assert escape_name(name) == shown


@pytest.mark.parametrize(
    ("users", "counted", "sentence"),
    [
        ({"Books": 60, "War": 0}, ["Books"], None),
        (
            {"Books": 60, "War": 1, "No\nir": 1200, "Toys": 70},
            ["Books", "Toys"],
            "the mean is of 2 domains; left out, with fewer than 50 users: "
            "War (1), No�ir (1,200)",
        ),
        ({"War": 1}, ["War"], "no domain has 50 users: the mean is of all 1"),
        ({"War": 0}, [], None),
    ],
)
def test_domains_that_do_not_count_are_named(users, counted, sentence):
    assert mean_sentence(users, counted, 50) == sentence


def split_record(kind, whose="first", without=3, unseen=2):
    figures = dict.fromkeys(["NDCG@10"], 0.25)
    return {
        "kind": kind,
        "step": 3,
        "mean": figures,
        "split": {
            "kind": "timeline",
            "whose": whose,
            "counts": "cut",
            "validation": "2014-06-01 00:00",
            "test": "2014-07-01 00:00",
            "without_history": without,
        },
        "unseen": {
            "items": {"Books": 5, "Toys": 0},
            "model": {
                "Books": {"users": unseen, **figures},
                "Toys": {"users": 0, "NDCG@10": None},
            },
        },
        "domains": {
            "Books": {"users": 1200, **figures},
            "Toys": {"users": 7, **figures},
        },
    }


@pytest.mark.parametrize(
    ("record", "sentences"),
    [
        (
            split_record("test"),
            [
                "Split by time: trained on what is before 2014-06-01 00:00; of test, from "
                "2014-07-01 00:00 on, the first event of each user is ranked",
                "3 events have nothing of their user before them and are left out",
                "Events of an item that training never saw, which do not count: Books 2",
            ],
        ),
        (
            split_record("validation", "all", 0, 0),
            [
                "Split by time: trained on what is before 2014-06-01 00:00; of validation, "
                "from 2014-06-01 00:00 to 2014-07-01 00:00, all events of each user are "
                "ranked"
            ],
        ),
    ],
)
def test_a_split_by_time_is_named_with_its_cuts(record, sentences):
    assert split_sentences(Evaluation.from_record(record)) == sentences
    caption = evaluation_table(record).caption.plain
    assert caption == "\n".join(sentences)


MODULES = [
    "console",
    "full_ranking_tables",
    "html",
    "log_lines",
    "plots",
    "run_log",
    "run_report",
]


@pytest.mark.ranks
def test_reporting_loads_nothing_that_trains():
    names = ", ".join(f"trainer.reporting.{module}" for module in MODULES)
    code = f"import sys, {names}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {
        "torch",
        "deepspeed",
        "torchrec",
        "fbgemm_gpu",
        "duckdb",
        "pyarrow",
    }
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    "name", ["Books", "Documentary", "Science Fiction", "Musical/Comedies"]
)
def test_no_word_of_a_name_is_broken_at_80_columns(name):
    figures = dict.fromkeys(["HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"], 0.25)
    record = {
        "kind": "test",
        "step": 1200,
        "mean": figures,
        "domains": {name: {"users": 123456, **figures}},
        "popularity": {name: {"NDCG@10": 0.01}},
        "popularity_mean": {"NDCG@10": 0.01},
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(record))
    text = console.export_text()
    assert all(word in text for word in [*name.split(), "×25.00", "0.2500"])
    assert "…" not in text
