"""Traces of PyTorch's profiler, and the log of phases, of a small run."""

import gzip
import json
from types import SimpleNamespace

import pytest

from tests.helpers.runs import SmallRun
from trainer.errors import InputError
from trainer.reporting.trace.page import write_trace
from trainer.reporting.trace.phases import PHASES
from trainer.reporting.trace.records import PhaseWriter, read_phases
from trainer.training.loop import train
from trainer.training.observers import profiler
from trainer.training.observers.profiler import format_operators

SETTINGS = [
    "log.tensorboard=false",
    "evaluation.negatives=3",
    "checkpoint.every_minutes=0",
    "checkpoint.every_epochs=0",
    "epochs=2",
]


@pytest.fixture
def run(group, tmp_path, without_report):
    return SmallRun(tmp_path, group, *SETTINGS)


def test_a_window_is_traced_with_its_phases(run, capsys):
    config = run.configured(
        *SETTINGS, "profile.steps=2-3", "profile.phases=true"
    )
    train(config, run.ranks)
    folder = run.folder / "profile"
    trace = folder / "steps-2-3-rank-00000.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    for phase in ("rows", "forward", "backward", "table", "optimizer"):
        assert names.count(f"phase: {phase}") >= 2
    table = (folder / "operators.txt").read_text()
    assert table.startswith("operators of steps 2 to 3, rank 0\n")
    assert "aten::mm" in table and "phase:" not in table
    assert "operators of steps 2 to 3" in capsys.readouterr().out
    # The phases of all steps, in an order that a picture can be drawn of.
    (rank,) = read_phases(run.folder)
    assert list(rank.steps) == list(range(1, len(rank.steps) + 1))
    phases = {span.phase for spans in rank.steps.values() for span in spans}
    assert phases == set(PHASES)
    assert "1 rank" in write_trace(run.folder).read_text()


def test_what_a_stopped_run_has_is_kept(run):
    config = run.configured(*SETTINGS, "profile.steps=2-4", "max_steps=4")

    def stop(self, state, report):
        if state.step == 2:
            raise ZeroDivisionError

    callback = type("Stop", (profiler.Callback,), {"on_step": stop})()
    with pytest.raises(ZeroDivisionError):
        train(config, run.ranks, callbacks=[callback])
    names = [file.name for file in (run.folder / "profile").iterdir()]
    assert "steps-2-2-rank-00000.trace.json.gz" in names


def test_steps_after_the_last_are_refused_before_anything(run):
    config = run.configured(*SETTINGS, "profile.steps=100-110", "max_steps=4")
    with pytest.raises(InputError, match=r"100-110, and the run has 4 steps"):
        train(config, run.ranks)
    assert not (run.folder / "config.yaml").exists()


@pytest.mark.parametrize("steps", ["0-3", "5-4", "ten", "3-", "-3"])
def test_steps_that_are_none_are_refused(run, steps):
    with pytest.raises(InputError, match=r"profile\.steps is"):
        run.configured(f"profile.steps={steps}")


def test_a_full_disk_ends_no_run(run, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PhaseWriter, "_open", fail)
    monkeypatch.setattr(profiler.StepProfiler, "_write", fail)
    config = run.configured(
        *SETTINGS, "profile.phases=true", "profile.steps=1", "max_steps=3"
    )
    assert train(config, run.ranks)["kind"] == "test"
    error = capsys.readouterr().err
    assert error.count("phases are not written any more") == 1
    assert error.count("the profile is not written") == 1


def test_operators_are_sorted_by_their_own_time():
    averages = [
        SimpleNamespace(
            key=name,
            count=1000,
            self_cpu_time_total=host,
            self_device_time_total=9,
        )
        for name, host in (
            ("phase: forward", 10**6),
            ("aten::small", 1000),
            ("aten::" + "long" * 20, 3000),
        )
    ]
    head, first, second = format_operators(averages, 2)
    assert head.split() == [
        "operator",
        "(host)",
        "calls",
        "ms",
        "a",
        "step",
        "share",
    ]
    assert first.split()[1:] == ["1,000", "1.500", "75.0%"] and "…" in first
    assert second.split() == ["aten::small", "1,000", "0.500", "25.0%"]
    device = format_operators(averages, 2, on_device=True)
    assert "(device)" in device[0] and device[1].split()[-1] == "50.0%"
