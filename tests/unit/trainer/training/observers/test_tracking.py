"""What trackers get of a run, and that none can end one."""

import pytest

from tests.helpers.runs import SmallRun
from tests.unit.trainer.reporting.trackers.test_thread import Recorded
from trainer.errors import InputError, RunStopped
from trainer.reporting.run_log import read_records
from trainer.training.callbacks import Callback
from trainer.training.loop import train
from trainer.training.observers import tracking

SETTINGS = [
    "log.tensorboard=false",
    "log.trackers=[mlflow]",
    "evaluation.negatives=3",
    "checkpoint.every_minutes=0",
    "checkpoint.every_epochs=0",
    "epochs=1",
]


@pytest.fixture
def run(group, tmp_path, without_report):
    return SmallRun(tmp_path, group, *SETTINGS)


@pytest.fixture
def made(monkeypatch):
    """The trackers that are made, each with what it was told of the run."""
    trackers = []

    def make(told):
        tracker = Recorded()
        tracker.told = told
        trackers.append(tracker)
        return tracker

    make.package = "json"
    monkeypatch.setitem(tracking._KINDS, "mlflow", make)
    return trackers


def test_trackers_get_each_record_and_the_resumed_run(run, made, capsys):
    class Stop(Callback):
        def on_log(self, state, record):
            if state.step == 3:
                raise RunStopped("asked")

    with pytest.raises(RunStopped):
        train(run.config, run.ranks, callbacks=[Stop()])
    (first,) = made
    assert first.calls == [
        ("begin",),
        *[("log", step) for step in (1, 2, 3)],
        ("end", "stopped"),
    ]
    assert first.told.resume_step is None and first.told.name == "run"
    assert first.told.parameters["model.dim"] == 8
    assert first.told.parameters["world_size"] == 1
    assert first.told.parameters["dataset"] == run.dataset.fingerprint
    train(run.config, run.ranks)
    second = made[1]
    logged = read_records(run.folder / "metrics.jsonl")
    # As metrics.jsonl has them: train records, the validation, the test.
    assert second.calls == [
        ("begin",),
        *[("log", record["step"]) for record in logged],
        ("end", "finished"),
    ]
    assert capsys.readouterr().err == ""


def test_a_tracker_that_fails_ends_no_run(run, made, monkeypatch, capsys):
    monkeypatch.setattr(Recorded, "_add", lambda self, *call: 1 / 0)
    assert train(run.config, run.ranks)["kind"] == "test"
    error = capsys.readouterr().err
    assert "warning: recorded: ZeroDivisionError: division by zero" in error
    assert error.count("warning:") == 2  # and how much was lost


def test_a_package_that_is_missing_is_refused_before_anything(
    run, made, monkeypatch
):
    tracking._KINDS["mlflow"].package = "no_such_package"
    tracking._KINDS["mlflow"].name = "mlflow"
    with pytest.raises(InputError) as refusal:
        train(run.config, run.ranks)
    assert str(refusal.value) == (
        "log.trackers: no_such_package is not installed: pip install "
        '"syncrec-trainer[mlflow]", or leave mlflow out'
    )
    assert made == [] and not run.folder.exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("log.trackers=[aim]", "log.trackers has aim: there are mlflow, wandb"),
        ("log.trackers=[mlflow, mlflow]", "give each one once"),
    ],
)
def test_other_names_are_refused(run, setting, reason):
    with pytest.raises(InputError, match=reason):
        run.configured(setting)
