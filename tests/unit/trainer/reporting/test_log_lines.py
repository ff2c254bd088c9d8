"""The lines of a run's log, short and verbose, and the table of domains."""

import io
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.trainer.reporting.test_console import split_record
from trainer.reporting.line_folding import WIDTH_IN_A_PIPE
from trainer.reporting.log_lines import LogLines


def validation(names, step=3, value=0.25):
    figures = {"NDCG@10": value}
    return {
        "kind": "validation",
        "step": step,
        "mean": figures,
        "domains": {name: {"users": 1200, **figures} for name in names},
    }


def train(weights, gaps, **changes):
    record = {"kind": "train", "step": 3, "lambda": weights, "phi": gaps}
    return record | changes


def rendered(table, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("encoding", "head"),
    [("utf-8", "λ φ"), ("ascii", "lambda phi"), ("?", "lambda phi")],
)
def test_a_console_without_greek_gets_letters(encoding, head):
    console = SimpleNamespace(encoding=encoding)
    lines = LogLines.for_console(console, ["Books"], 10, verbose=True)
    record = train({"Books": 1.0}, {"Books": -0.5})
    line = lines.train_line(record)
    assert f"│  {head} Books 1.000 -0.500" in line.plain
    assert line.plain.startswith("0:00:00  step  3/10  epoch 0  loss –")
    lines = LogLines.for_console(console, ["Books"], 10)
    lines.remember(record)
    header, row = rendered(lines.domain_table(validation(["Books"])))
    assert header.split() == ["domain", "users", "NDCG@10", *head.split()]
    assert row.split() == ["Books", "1,200", "0.2500", "1.000", "−0.500"]


def test_a_verbose_line_counts_events_of_a_split_by_time():
    lines = LogLines(["Books", "Toys"], 10, verbose=True)
    line = lines.evaluation_line(split_record("test")).plain
    expected = "1,207 events, 3 without history, 2 of an unseen item"
    assert line.endswith(expected)
    assert lines.domain_table(validation(["Books"])) is None


@pytest.mark.parametrize(
    ("best", "end"),
    [
        (None, "NDCG@10 0.2500"),
        ({"step": 3, "NDCG@10": 0.25}, "the best so far"),
        ({"step": 1, "NDCG@10": 0.5}, "best 0.5000 at step 1"),
    ],
)
def test_a_validation_says_which_is_the_best(best, end):
    lines = LogLines(["Books"], 10)
    line = lines.evaluation_line(validation(["Books"]), best)
    assert line.plain.endswith(end)


def test_a_domain_that_is_harmed_is_red():
    lines = LogLines(["Books", "Toys"], 10)
    lines.remember(train({}, {"Books": -0.5, "Toys": 0.5}))
    console = Console(file=io.StringIO(), force_terminal=True, _environ={})
    console.print(lines.domain_table(validation(["Books", "Toys"])))
    text = console.file.getvalue()
    assert "\x1b[31m−0.500" in text and "\x1b[31m+0.500" not in text
    assert "λ" not in text  # without loss correction


@pytest.mark.parametrize("color", ["NO_COLOR", "TERM"])
def test_no_colour_where_it_is_not_wanted(color):
    environment = {"NO_COLOR": "1"} if color == "NO_COLOR" else {"TERM": "dumb"}
    console = Console(
        file=io.StringIO(), force_terminal=True, _environ=environment
    )
    lines = LogLines(["Books"], 10)
    lines.remember(train({}, {"Books": -0.5}))
    console.print(lines.domain_table(validation(["Books"])))
    assert "\x1b[31m" not in console.file.getvalue()


def test_of_many_domains_the_table_has_those_of_the_lowest_transfer():
    names = [f"domain {number}" for number in range(19)]
    lines = LogLines(names, 100)
    lines.remember(train({}, {name: -0.01 * i for i, name in enumerate(names)}))
    _, *rows, rest = rendered(lines.domain_table(validation(names)))
    assert [row.split()[1] for row in rows] == [str(i) for i in range(7, 19)]
    assert rest.split() == ["7", "more"]


@given(
    names=st.lists(st.text(max_size=40), min_size=1, max_size=15, unique=True),
    loss=st.none() | st.floats(0, 99),
    speed=st.none() | st.floats(0.01, 1e9),
)
def test_a_line_and_the_table_fit_a_pipe(names, loss, speed):
    lines = LogLines(names, 50_000)
    lines.remember(validation(names))
    figures = dict.fromkeys(names, -0.1234567)
    record = train(
        figures, figures, loss=loss, users_per_second=speed, data_wait=1.0
    )
    record |= {"step": 50_000, "seconds": 80_000}
    lines.remember(record)
    assert lines.train_line(record, 80_000).cell_len <= WIDTH_IN_A_PIPE
    rows = rendered(lines.domain_table(validation(names)))
    assert max(map(len, rows)) <= WIDTH_IN_A_PIPE
    assert len(rows) <= 14
