"""Log lines that are wider than the console."""

import pytest
from rich.text import Text

from trainer.reporting.line_folding import fold_line
from trainer.reporting.log_lines import LogLines

NAMES = ["Documentary", "Science Fiction", "Film-Noir", "日本映画"]


def record(names):
    return {
        "step": 20,
        "loss": 2.51234,
        "loss_single": 1.234,
        "loss_cross": 1.2,
        "mutual_information": 0.1,
        "lambda": dict.fromkeys(names, 0.149),
        "phi": dict.fromkeys(names, -0.0123),
        "users_per_second": 12345,
        "tokens_per_second": 4560000,
        "data_wait": 0.031,
        "memory_gb": 3.2,
    }


def test_a_line_that_fits_is_one_row():
    line = Text("0:03:20  step 1/2  │  λ φ Books 0.5 -0.1")
    assert fold_line(line, 60) is line


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("domains", [1, 4])
def test_no_figure_is_cut_and_nothing_is_lost(width, domains):
    names = NAMES[:domains]
    line = LogLines(names, 100, verbose=True).train_line(record(names))
    rows = fold_line(line, width).split("\n")
    assert max(row.cell_len for row in rows) <= width
    words = [word for row in rows for word in row.plain.split()]
    assert [word for word in words if word != "│"] == [
        word for word in line.plain.split() if word != "│"
    ]
    for name in names:  # a domain stands beside its figures
        shown = f"{name} 0.149 -0.012"
        assert any(shown in row.plain for row in rows)
    assert all(row.plain.startswith(" " * 9) for row in rows[1:])


def test_a_section_that_fits_is_not_divided():
    line = Text("0:03:20  step 1  │  λ φ Books 0.5, Toys 0.25  │  3 users/s")
    assert fold_line(line, 40).plain.split("\n") == [
        "0:03:20  step 1",
        "         λ φ Books 0.5, Toys 0.25",
        "         3 users/s",
    ]


def test_of_many_domains_those_of_the_lowest_transfer_are_shown():
    names = [f"domain {number}" for number in range(19)]
    figures = record(names)
    figures["phi"] = {name: -0.01 * i for i, name in enumerate(names)}
    line = LogLines(names, 100, verbose=True).train_line(figures).plain
    assert "domain 18 0.149 -0.180, 7 more" in line
    assert "domain 7 " in line and "domain 6 " not in line
    assert len(fold_line(Text(line), 100).plain.split("\n")) <= 6
