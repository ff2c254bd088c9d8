import errno
import io
import json
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainer.errors import InputError
from trainer.files import progress
from trainer.reporting.console import evaluation_table
from trainer.reporting.run_log import (
    LogConsole,
    RunLog,
    count_skipped_users,
    median_over_steps,
    read_records,
    skipped_sentence,
)
from trainer.run_files import METRICS_FILE

METRICS = ["HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
HOSTILE = ["<script>", "[red]Books[/]", "two\nlines", "\x1b[31mred", ""]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train_record(step, domains=("Books", "Toys"), **changes):
    by_domain = {domain: 1.0 + number for number, domain in enumerate(domains)}
    record = {
        **{
            "step": step,
            "epoch": 0,
            "seconds": 1.5 * step,
            "loss": 2.5,
            "loss_single": 2.0,
            "loss_cross": 1.0,
        },
        **{
            "mutual_information": 0.5,
            "single_by_domain": by_domain,
            "cross_by_domain": by_domain,
        },
        **{
            "lambda": dict.fromkeys(domains, 1 / len(domains)),
            "phi": dict.fromkeys(domains, -0.125),
        },
        **{
            "alpha": 1.0,
            "beta": 1.0,
            "learning_rate": 1e-3,
            "gradient_norm": None,
            "users_per_second": 12300.0,
        },
        **{"tokens_per_second": 4.56e6, "data_wait": 0.031, "memory_gb": 3.25},
    }
    return record | changes


def evaluation_record(
    step, domains=("Books", "Toys"), kind="validation", **changes
):
    figures = {"users": 10, **dict.fromkeys(METRICS, 0.25)}
    mean = dict.fromkeys(METRICS, 0.25)
    return {
        "kind": kind,
        "step": step,
        "epoch": 0,
        "domains": {d: figures for d in domains},
        "mean": mean,
        "too_short": 3,
    } | changes


def open_log(
    folder,
    domains=("Books", "Toys"),
    file=None,
    total_steps=100,
    width=500,
    **options,
):
    return RunLog(
        folder,
        total_steps,
        list(domains),
        console=LogConsole(file=file or io.StringIO(), width=width),
        **options,
    )


def strict_lines(folder):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / METRICS_FILE).read_text().splitlines()
    ]


def test_records_become_plain_json(tmp_path):
    with open_log(tmp_path / "new" / "run") as log:
        log.train(
            train_record(
                10,
                loss=float("nan"),
                phi={"Books": np.float32("inf"), "Toys": np.float32(0.5)},
            )
        )
        log.train(
            train_record(
                20, loss=torch.tensor(1.25), users_per_second=np.float64("nan")
            )
        )
        log.evaluation(evaluation_record(20))
    first, second, third = strict_lines(tmp_path / "new" / "run")
    assert (first["kind"], first["loss"], first["phi"]) == (
        "train",
        None,
        {"Books": None, "Toys": 0.5},
    )
    assert (second["loss"], second["users_per_second"]) == (1.25, None)
    assert third["kind"] == "validation" and third["seconds"] >= 0


def test_a_record_is_on_disk_before_the_next(tmp_path):
    with open_log(tmp_path) as log:
        log.train(train_record(10))
        assert [record["step"] for record in strict_lines(tmp_path)] == [10]


def test_resume_takes_out_later_steps_and_a_torn_line(tmp_path):
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            log.train(train_record(step))
        log.evaluation(evaluation_record(20))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')
    with open_log(tmp_path, resume_step=20) as log:
        log.train(train_record(30, loss=9.0))
    assert [(r["kind"], r["step"]) for r in strict_lines(tmp_path)] == [
        ("train", 10),
        ("train", 20),
        ("validation", 20),
        ("train", 30),
    ]
    assert strict_lines(tmp_path)[-1]["loss"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize(
    "resume_step, steps", [(None, [1]), (0, [1]), (10, [10, 1])]
)
def test_what_a_start_keeps(tmp_path, resume_step, steps):
    with open_log(tmp_path) as log:
        log.train(train_record(10))
    with open_log(tmp_path, resume_step=resume_step) as log:
        log.train(train_record(1))
    assert [record["step"] for record in strict_lines(tmp_path)] == steps


def test_resume_without_a_file_starts_one(tmp_path):
    with open_log(tmp_path, resume_step=50) as log:
        log.train(train_record(60))
    assert [record["step"] for record in strict_lines(tmp_path)] == [60]


def test_resume_survives_nan_literals_of_another_writer(tmp_path):
    (tmp_path / METRICS_FILE).write_text(
        '{"kind": "train", "step": 1, "loss": NaN}\n'
    )
    with open_log(tmp_path, resume_step=1):
        pass
    assert strict_lines(tmp_path) == [
        {"kind": "train", "step": 1, "loss": None}
    ]


@given(cut=st.integers(0, 400))
def test_any_torn_file_reads_as_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / METRICS_FILE
    lines = [
        json.dumps(
            {"kind": "train", "step": step, "loss": 0.5, "phi": {"Böoks": 1}}
        )
        + "\n"
        for step in range(5)
    ]
    content = "".join(lines).encode()
    path.write_bytes(content[:cut])
    whole = sum(
        len("".join(lines[: n + 1]).rstrip("\n").encode()) <= cut
        for n in range(5)
    )
    assert [record["step"] for record in read_records(path)] == list(
        range(whole)
    )


@pytest.mark.parametrize(
    "line",
    [
        "12",
        "null",
        "[1]",
        '{"step": 1}',
        '{"kind": "train"}',
        '{"kind": "train", "step": "x"}',
        "�",
    ],
)
def test_lines_that_are_no_records_are_left_out(tmp_path, line):
    (tmp_path / METRICS_FILE).write_text(
        line + '\n{"kind": "train", "step": 7}\n'
    )
    assert [
        record["step"] for record in read_records(tmp_path / METRICS_FILE)
    ] == [7]


def test_other_ranks_write_nothing(tmp_path, capsys):
    file = io.StringIO()
    with open_log(tmp_path / "run", file=file, enabled=False) as log:
        log.message("hello")
        log.train(train_record(10))
        log.evaluation(evaluation_record(10))
        log.advance(10)
    assert not (tmp_path / "run").exists()
    assert file.getvalue() == "" == capsys.readouterr().out


def test_each_record_is_one_line_off_a_terminal(tmp_path):
    file, domains = io.StringIO(), [f"domain {number}" for number in range(12)]
    with open_log(tmp_path, domains, file, verbosity="verbose") as log:
        log.advance(50)
        log.train(train_record(50, domains))
        log.evaluation(evaluation_record(50, domains))
        log.message("done [bold]not markup[/bold]")
    train, evaluation, message = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue() and "━" not in file.getvalue()
    for part in (
        "step  50/100",
        "loss 2.5000",
        "single 2.0000",
        "MI 0.5000",
        "λ φ",
        "domain 11 0.083 -0.125",
        "12.3k users/s",
    ):
        assert part in train
    assert (
        "4.56M tokens/s" in train and "wait 3.1%" in train and "3.2 GB" in train
    )
    assert (
        "validation" in evaluation
        and "NDCG@10 0.2500" in evaluation
        and "120 users, 3 too short" in evaluation
    )
    assert message == "done [bold]not markup[/bold]"


def test_lines_fit_into_the_console(tmp_path):
    """Off a terminal too; a record's figures stay whole, and a message is cut between words."""
    file, domains = io.StringIO(), [f"domain {number}" for number in range(12)]
    with open_log(
        tmp_path, domains, file, width=100, verbosity="verbose"
    ) as log:
        log.train(train_record(50, domains))
        log.evaluation(evaluation_record(50, domains))
        log.message("the dataset has " + "many users, " * 20)
    rows = file.getvalue().splitlines()
    assert max(map(len, rows)) <= 100
    for number in range(12):
        assert f"domain {number} 0.083 -0.125" in file.getvalue()
    assert not [row for row in rows if not row.strip()]


def test_the_first_step_is_told_where_no_bar_is(tmp_path):
    file = io.StringIO()
    with open_log(tmp_path, file=file) as log:
        log.advance(1)
        log.show_first_step()
    assert re.fullmatch(
        r"0:00:0\d  step 1/100  the first step took [\d.e-]+ s\n",
        file.getvalue(),
    )


def test_a_long_silence_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", 0.05)
    monkeypatch.setattr(progress, "_EVERY", 0.05)
    file = io.StringIO()
    with open_log(tmp_path, file=file, resume_step=20) as log:
        log.advance(2)
        time.sleep(0.2)
        log.show_activity("validation: batch 3 of 40")
        time.sleep(0.2)
    lines = file.getvalue().splitlines()
    assert re.fullmatch(
        r"0:00:0\d  step 22/100  [\d.]+ s a step, 0:00:\d\d left", lines[0]
    )
    assert lines[-1].endswith("step 22/100  validation: batch 3 of 40")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_who_reads_no_more_ends_no_run(tmp_path, number):
    """A pipe to `head`, a terminal that was closed."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, "gone")

    with open_log(tmp_path, file=Gone()) as log:
        log.train(train_record(10))
        log.train(train_record(20))
    assert len(strict_lines(tmp_path)) == 2


def test_the_bar_is_drawn_on_a_terminal(tmp_path):
    file = Terminal()
    console = Console(file=file, width=100, force_terminal=True, _environ={})
    with RunLog(
        tmp_path,
        100,
        ["Books"],
        resume_step=20,
        console=console,
    ) as log:
        log.train(train_record(49, ["Books"]))
        log.advance(30)
    assert "50/100" in file.getvalue() and "loss 2.5000" in file.getvalue()


def test_hostile_names_stay_on_one_line_letter_by_letter(tmp_path):
    file = io.StringIO()
    with open_log(tmp_path, HOSTILE, file, verbosity="verbose") as log:
        log.train(train_record(1, HOSTILE))
        log.evaluation(evaluation_record(1, HOSTILE))
        log.message(evaluation_table(evaluation_record(1, HOSTILE)))
    text = file.getvalue()
    assert text.count("step   1/100") == 2
    for name in (
        "<script>",
        "[red]Books[/]",
        "two�lines",
        "�[31mred",
        "(no name)",
    ):
        assert text.count(name) == 3, name
    assert "\x1b" not in text
    assert strict_lines(tmp_path)[0]["phi"].keys() == set(HOSTILE)


def test_a_console_without_greek_does_not_end_the_run(tmp_path):
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding="ascii")
    with open_log(tmp_path, ["本"], console, verbosity="verbose") as log:
        log.train(train_record(1, ["本"]))
        log.message("naïve")
    console.flush()
    text = raw.getvalue().decode("ascii")
    assert "lambda phi ? 1.000 -0.125" in text and "na?ve" in text


def test_lines_without_lambda_or_figures(tmp_path):
    file = io.StringIO()
    empty = dict.fromkeys(METRICS)
    with open_log(tmp_path, file=file, verbosity="verbose") as log:
        log.train(
            train_record(
                1,
                **{
                    "lambda": {"Books": None, "Toys": None},
                    "mutual_information": None,
                },
            )
        )
        log.train(
            train_record(2, **{"lambda": {}, "phi": {}, "loss": float("nan")})
        )
        log.evaluation(
            evaluation_record(2, mean=empty)
            | {"domains": {"Books": {"users": 0, **empty}}}
        )
    first, second, third = file.getvalue().splitlines()
    assert (
        "φ Books -0.125, Toys -0.125" in first
        and "λ" not in first
        and "MI" not in first
    )
    assert "loss –" in second and "φ" not in second
    assert "NDCG@10 –" in third and "Books –" in third


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(
            InputError, match=r"run/metrics\.jsonl: cannot be written"
        ),
        open_log(tmp_path / "run"),
    ):
        pass


def test_an_exception_passes_through_and_closes_the_file(tmp_path):
    with pytest.raises(ZeroDivisionError), open_log(tmp_path) as log:
        log.train(train_record(1))
        raise ZeroDivisionError
    assert log._file.closed


def render(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def test_the_table_fits_80_columns_and_compares_with_popularity():
    half = {"users": 10, **dict.fromkeys(METRICS, 0.125)}
    nothing = {"users": 0, **dict.fromkeys(METRICS)}
    record = evaluation_record(
        1200, ["Books", "Office products and supplies"], kind="test"
    )
    record["domains"]["Toys"] = nothing
    record |= {
        "popularity": {"Books": half, "Toys": nothing},
        "popularity_mean": dict.fromkeys(METRICS, 0.1),
    }
    text = render(evaluation_table(record))
    assert "…" not in text and "Test at step 1,200" in text
    rows = {
        line.split()[0]: line.split()
        for line in text.splitlines()
        if line.strip()
    }
    assert rows["Books"][1:] == ["10", *["0.2500"] * 5, "0.1250", "×2.00"]
    assert rows["Toys"][1:] == ["0", *["–"] * 7]
    assert rows["mean"][1:] == ["20", *["0.2500"] * 5, "0.1000", "×2.50"]
    del record["popularity"], record["popularity_mean"]
    assert "×" not in render(evaluation_table(record))


def test_with_recency_the_table_fits_100_columns_and_has_the_ratio_to_it():
    record = evaluation_record(1200, ["Books", "Office products"], kind="test")
    names = list(record["domains"])
    for system, value in (
        ("popularity", 0.05),
        ("recency", 0.2),
        ("with_recency", 0.3),
    ):
        figures = {"users": 10, **dict.fromkeys(METRICS, value)}
        record[system] = dict.fromkeys(names, figures)
        record[f"{system}_mean"] = dict.fromkeys(METRICS, value)
    record["recency_choice"] = {"half_life": 30, "unit": "days"}
    text = render(evaluation_table(record), 100)
    assert "…" not in text and "half-life of 30 days" in text
    rows = {
        line.split()[0]: line.split()
        for line in text.splitlines()
        if line.strip()
    }
    compared = ["0.0500", "0.2000", "×1.25", "0.3000"]
    assert rows["Books"][1:] == ["10", *["0.2500"] * 5, *compared]
    assert rows["mean"][1:] == ["20", *["0.2500"] * 5, *compared]
    del record["with_recency"], record["with_recency_mean"]
    assert "…" not in render(evaluation_table(record), 90)


def test_skipped_users_are_shown_where_there_are_any(tmp_path):
    file = io.StringIO()
    with open_log(tmp_path, file=file, verbosity="verbose") as log:
        for users in (0, 1234):
            log.train(train_record(50, skipped_users=users))
            log.evaluation(evaluation_record(50, skipped_users=users))
    whole, evaluated, torn, evaluated_torn = file.getvalue().splitlines()
    assert "skipped" not in whole + evaluated
    assert torn.endswith("GB  1,234 users skipped") and evaluated_torn.endswith(
        "3 too short, 1,234 skipped"
    )
    assert "1,234 users could not be read" in render(
        evaluation_table(evaluation_record(50, skipped_users=1234))
    )
    assert "could not be read" not in render(
        evaluation_table(evaluation_record(50, skipped_users=0))
    )


def test_skipped_users_are_summed_over_train_records_alone(tmp_path):
    with open_log(tmp_path) as log:
        for step, users in ((10, 3), (20, 0), (30, 4), (40, 50)):
            log.train(train_record(step, skipped_users=users))
        log.train(train_record(25))
        log.evaluation(evaluation_record(30, skipped_users=1000))
    assert count_skipped_users(read_records(tmp_path / METRICS_FILE)) == 57
    with open_log(
        tmp_path, resume_step=30
    ) as log:  # step 40 is about to be run again
        log.train(train_record(40, skipped_users=50))
    assert count_skipped_users(read_records(tmp_path / METRICS_FILE)) == 57
    assert (
        count_skipped_users(
            [
                {"kind": "train", "skipped_users": value}
                for value in (None, "9", [1], 2)
            ]
        )
        == 2
    )
    assert skipped_sentence(1).startswith(
        "1 user was skipped"
    ) and skipped_sentence(1057).startswith("1,057 users were")


def test_a_log_has_short_lines_and_a_table_of_domains_at_validations(tmp_path):
    file = io.StringIO()
    best = {"step": 50, "NDCG@10": 0.25}
    with open_log(tmp_path, file=file, width=120) as log:
        log.advance(50)
        log.train(train_record(50))
        log.evaluation(evaluation_record(50), best)
        log.train(train_record(60, skipped_users=3))
        log.evaluation(evaluation_record(50, kind="test"))
    first, validation, *table, second, test = file.getvalue().splitlines()
    assert re.fullmatch(
        r"0:01:15  step  50/100  loss 2.5000  12.3k users/s  wait 3%  "
        r"0:00:0\d left",
        first,
    )
    assert validation.endswith("validation  NDCG@10 0.2500  the best so far")
    assert [row.split() for row in table] == [
        ["domain", "users", "NDCG@10", "λ", "φ"],
        ["Books", "10", "0.2500", "0.500", "−0.125"],
        ["Toys", "10", "0.2500", "0.500", "−0.125"],
    ]
    assert "loss 2.5000  NDCG@10 0.2500  12.3k users/s" in second
    assert second.endswith("left  3 users skipped")
    assert test.endswith("test  NDCG@10 0.2500")


def test_a_resumed_run_shows_what_was_validated_before(tmp_path):
    with open_log(tmp_path) as log:
        log.train(train_record(10))
        log.evaluation(evaluation_record(10))
        log.evaluation(evaluation_record(20, mean={"NDCG@10": 0.5}))
    file = io.StringIO()
    with open_log(tmp_path, file=file, resume_step=10) as log:
        log.train(train_record(11))
    assert "loss 2.5000  NDCG@10 0.2500  " in file.getvalue()


def test_a_quiet_log_shows_the_test_alone(tmp_path):
    file = io.StringIO()
    with open_log(tmp_path, file=file, verbosity="quiet") as log:
        log.message("the model has 3 parameters")
        log.advance(10)
        log.show_first_step()
        log.train(train_record(10))
        log.evaluation(evaluation_record(10))
        log.evaluation(evaluation_record(10, kind="test"))
        log.message(evaluation_table(evaluation_record(10, kind="test")))
    (line,) = file.getvalue().splitlines()
    assert line.endswith("step  10/100  test  NDCG@10 0.2500")
    kinds = [record["kind"] for record in read_records(tmp_path / METRICS_FILE)]
    assert kinds == ["train", "validation", "test"]


def test_a_record_that_is_not_shown_is_on_disk_all_the_same(tmp_path):
    file = io.StringIO()
    with open_log(tmp_path, file=file) as log:
        log.train(train_record(1), shown=False)
        assert not file.getvalue()
        log.train(train_record(2))
        assert "step   2/100" in file.getvalue()
    records = read_records(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [1, 2]


@pytest.mark.parametrize(
    ("speeds", "median"),
    [
        ([], None),
        ([(1, None)], None),
        ([(1, 10), (2, 20), (4, 80)], 80),
        # Fifty slow first steps do not stand for a thousand.
        ([*((step, 1.0) for step in range(1, 51)), (1000, 9.0)], 9),
        # A run that was resumed in between counts each step once.
        ([(10, 5), (20, 7), (30, 7)], 7),
    ],
)
def test_a_median_is_over_steps_not_over_records(speeds, median):
    records = [
        {"step": step, "users_per_second": speed} for step, speed in speeds
    ]
    assert median_over_steps(records, "users_per_second") == median
