"""The page of a trace, and its command."""

import re
import sys

import pytest

from launch import trace
from trainer.errors import InputError
from trainer.reporting.trace.page import write_trace
from trainer.reporting.trace.records import PhaseWriter


@pytest.fixture
def run(tmp_path):
    """A run of two ranks, of which rank 1 is late to each sum."""
    for rank in range(2):
        writer = PhaseWriter(tmp_path, rank, 2, "cpu")
        writer._epoch = 1000.0
        writer.listen("between", 0.0)
        for step in range(1, 61):
            begun = 0.1 * step
            writer.listen("forward", begun + 0.01)
            writer.listen("sums", begun + (0.02, 0.05)[rank])
            writer.listen("backward", begun + 0.06)
            writer.listen("between", begun + 0.1)
            writer.end_step(step)
        writer.close()
    return tmp_path


def test_it_says_who_waits_for_whom(run):
    file = write_trace(run)
    text = file.read_text()
    assert file == run / "trace.html"
    assert (
        "2 ranks on" in text and "The tables are of 55 steps (6 to 60)" in text
    )
    assert "Rank 0 waits most, 33% of its time" in text
    assert "100% is for rank 1" in text
    assert "Steps 57 to 60" in text and "waits 30.00 ms for rank 1" in text
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert "30.00" in cells


def test_a_window_is_drawn_and_a_wrong_one_refused(run):
    text = write_trace(run, (10, 11)).read_text()
    assert "Steps 10 to 11" in text and "step 11: forward" in text
    assert "step 12: forward" not in text
    with pytest.raises(
        InputError, match="none of the steps 90-99: give some of 1-60"
    ):
        write_trace(run, (90, 99))
    with pytest.raises(InputError, match="are 60: give at most 50"):
        write_trace(run, (1, 60))


def test_one_rank_waits_for_nobody(tmp_path):
    writer = PhaseWriter(tmp_path, 0, 1, "cuda")
    writer.listen("forward", 0.0)
    writer.listen("between", 1.0)
    writer.end_step(1)
    writer.close()
    text = write_trace(tmp_path).read_text()
    assert "1 rank on" in text and "runs ahead of the device" in text
    assert "Who waits for whom" not in text


@pytest.mark.parametrize("steps", ["0-3", "5-4", "x", "3-", ""])
def test_steps_that_are_none_are_refused(run, monkeypatch, capsys, steps):
    arguments = ["trace", "--run", str(run), "--steps", steps]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        trace.main()
    assert end.value.code == 2 and "--steps" in capsys.readouterr().err


def test_the_command_draws_the_page(run, monkeypatch, capsys):
    arguments = ["--run", str(run), "--output", str(run / "other.html")]
    monkeypatch.setattr(sys, "argv", ["trace", *arguments, "--steps", "3"])
    trace.main()
    assert capsys.readouterr().out == f"trace: {run / 'other.html'}\n"
    assert "Steps 3 to 3" in (run / "other.html").read_text()
