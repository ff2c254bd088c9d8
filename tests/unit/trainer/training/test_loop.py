"""How a run ends, and what it leaves then."""

import errno
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

import trainer.checkpoint.save
import trainer.reporting.run_report
import trainer.training.callbacks
import trainer.training.loop
from tests.helpers.runs import SmallRun, seal
from trainer.checkpoint.layout import RunState, list_checkpoints, read_state
from trainer.checkpoint.save import Checkpoints
from trainer.errors import InputError, RunStopped
from trainer.evaluation.sampled import PositionCounts
from trainer.files.atomic import LateStorage
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE
from trainer.training.callbacks import Callback
from trainer.training.loop import train
from trainer.training.run_context import RunContext
from trainer.training.step import Trainer

SETTINGS = [
    "log.tensorboard=false",
    "evaluation.negatives=3",
    "checkpoint.every_minutes=0",
    "checkpoint.every_epochs=0",
]


@pytest.fixture(autouse=True)
def report(request):
    """Is drawn where it is asked for."""
    name = request.node.name
    if "report" not in name and "titles" not in name:
        request.getfixturevalue("without_report")


@pytest.fixture
def run(group, tmp_path):
    return SmallRun(tmp_path, group, *SETTINGS)


@pytest.fixture
def steps(monkeypatch):
    """Numbers of the steps that are made."""
    made, step = [], Trainer.train_step

    def counted(self, *arguments):
        made.append(self.step + 1)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", counted)
    return made


def test_after_an_early_stop_the_same_command_trains_no_further(
    run, steps, monkeypatch, capsys
):
    values, real = (
        iter([0.5, 0.4, 0.3, 0.2, 0.1]),
        trainer.training.callbacks.make_evaluation_record,
    )

    def ever_worse(kind, *arguments, **where):
        record = real(kind, *arguments, **where)
        if kind == "validation":
            record["mean"][HEADLINE] = next(values)
        return record

    monkeypatch.setattr(
        trainer.training.callbacks, "make_evaluation_record", ever_worse
    )
    config = run.configured(
        *SETTINGS,
        "epochs=9",
        "evaluation.patience=2",
        "optimizer.schedule=constant",
    )
    first = train(config, run.ranks)
    assert (
        "stopped early: 2 validations without a better mean"
        in capsys.readouterr().out
    )
    begun, best = len(steps), first["step"]
    assert begun == 3 * best  # the best epoch was the first
    assert list_checkpoints(run.folder)[0].name == f"step-{begun:08d}"
    second = train(config, run.ranks)
    assert len(steps) == begun
    assert {name: second[name] for name in ("step", "domains", "mean")} == {
        name: first[name] for name in ("step", "domains", "mean")
    }


@pytest.fixture
def ranked(monkeypatch):
    """ranked(counts, …): what the next evaluations of two domains find, users at each position."""

    def set_counts(*counts):
        left = iter(counts)

        def next_counts(*_, **__):
            histogram_DP = np.array(next(left))
            return PositionCounts(np.stack([histogram_DP, histogram_DP]))

        for module in (trainer.training.callbacks, trainer.training.loop):
            monkeypatch.setattr(module, "evaluate_split", next_counts)

    return set_counts


def validations(run):
    records = read_records(run.folder / "metrics.jsonl")
    return [record for record in records if record["kind"] == "validation"]


LARGE_IS_BEST = [[5, 0, 0], [0, 1, 0]]
SMALL_IS_BEST = [[4, 1, 0], [1, 0, 0]]
SMALL_HAS_GROWN = [[4, 1, 0], [5, 0, 0]]


def test_the_best_step_is_of_the_domains_that_the_first_validation_counts(
    run, ranked, capsys
):
    """A domain of one user does not choose, and not either once more of its users are there."""
    ranked(LARGE_IS_BEST, SMALL_IS_BEST, SMALL_HAS_GROWN, LARGE_IS_BEST)
    settings = ["epochs=3", "evaluation.min_users=2", "evaluation.patience=0"]
    record = train(run.configured(*SETTINGS, *settings), run.ranks)
    found = validations(run)
    assert record["step"] == found[0]["step"]
    large, small = [domain.name for domain in run.dataset.domains]
    assert [line["mean_domains"] for line in found] == [[large]] * 3
    assert record["mean_domains"] == [large]
    assert record["domains"][small]["users"] == 1
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "validation: the mean is of 1 domain; left out, with fewer than 2 "
        f"users: {small} (1)" in said
    )


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_with_the_domains_that_it_has_compared_by(
    run, ranked, before
):
    """A checkpoint of before does not say which domains count: all of them did."""
    settings = [
        *SETTINGS,
        "optimizer.schedule=constant",
        "evaluation.min_users=2",
    ]
    ranked(LARGE_IS_BEST, LARGE_IS_BEST)
    train(run.configured(*settings, "epochs=1"), run.ranks)
    checkpoint = list_checkpoints(run.folder)[0]
    if before:
        record = json.loads((checkpoint / "state.json").read_text())
        assert record["state"].pop("mean_domains")
        (checkpoint / "state.json").write_text(json.dumps(record))
        seal(checkpoint)
    ranked(SMALL_HAS_GROWN, LARGE_IS_BEST)
    train(run.configured(*settings, "epochs=2"), run.ranks)
    names = [domain.name for domain in run.dataset.domains]
    expected = names if before else names[:1]
    assert validations(run)[-1]["mean_domains"] == expected


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, InputError), (errno.ESTALE, LateStorage)],
)
def test_a_first_checkpoint_that_fails_takes_nothing_of_a_run_that_has_made_steps(
    run, steps, monkeypatch, number, kind
):
    config = run.configured(
        *SETTINGS, "max_steps=3", "checkpoint.every_steps=1"
    )

    def failing(*_):
        raise OSError(number, os.strerror(number), "the disk")

    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(trainer.checkpoint.save, "save_file", failing)
        train(config, run.ranks)
    assert type(error.value) is kind and os.strerror(number) in str(error.value)
    assert {"config.yaml", "metrics.jsonl"} <= {
        entry.name for entry in run.folder.iterdir()
    }
    assert steps
    train(config, run.ranks)
    assert list_checkpoints(run.folder)[0].name == "step-00000003"


def test_what_cannot_begin_takes_nothing_that_was_there_before(
    run, monkeypatch
):
    config = run.configured(*SETTINGS, "max_steps=3")

    def refused(*_, **__):
        raise InputError("by the test")

    monkeypatch.setattr(Checkpoints, "__init__", refused)
    with pytest.raises(InputError, match="by the test"):
        train(config, run.ranks)
    assert not run.folder.exists()
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text("")
    (run.folder / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1}) + "\n"
    )
    with pytest.raises(InputError, match="by the test"):
        train(config, run.ranks)
    assert (run.folder / "config.yaml").is_file() and (
        run.folder / "metrics.jsonl"
    ).is_file()


class Notes(Callback):
    """Writes down what it is called with, and what is on disk then."""

    def __init__(self, folder, calls, name):
        self.folder = folder
        self.calls = calls
        self.name = name

    def note(self, method, *values):
        self.calls.append((self.name, method, *values))

    def on_step(self, state, report):
        assert report.seconds > 0
        assert report.rank_batch.batch.interactions > 0
        assert report.loss.isfinite()
        assert report.losses.lambda_D.isfinite().all()
        self.note("step", state.step)

    def on_validation(self, state, record):
        *_, last = (self.folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(last)["mean"] == record["mean"]
        assert record["kind"] == "validation"
        assert record["step"] == state.step == state.validated
        self.note("validation", state.step)

    def on_checkpoint(self, state, folder):
        assert read_state(folder)["state"] == state
        assert json.loads((self.folder / "latest.json").read_text()) == {
            "folder": f"checkpoints/{folder.name}"
        }
        self.note("checkpoint", state.step)


def test_callbacks_are_called_in_order(run):
    """After the run's own: a validation is logged, and a checkpoint is whole on disk."""
    settings = ["max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    config = run.configured(*SETTINGS, *settings)
    calls = []
    callbacks = [Notes(run.folder, calls, name) for name in ("first", "second")]
    train(config, run.ranks, callbacks=callbacks)
    by_name = {"first": [], "second": []}
    for name, *call in calls:
        by_name[name].append(call)
    assert by_name["first"] == by_name["second"]
    assert [name for name, *_ in calls] == ["first", "second"] * (
        len(calls) // 2
    )
    others = [call for call in by_name["first"] if call[0] != "checkpoint"]
    assert others == [["step", 1], ["step", 2], ["validation", 3], ["step", 3]]
    written = [
        step for method, step in by_name["first"] if method == "checkpoint"
    ]
    assert written == [1, 2, 3]


@pytest.mark.parametrize(
    "method", ["on_step", "on_validation", "on_checkpoint"]
)
def test_an_exception_of_a_callback_ends_the_run_and_its_checkpoint_stays(
    run, method
):
    settings = ["max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    config = run.configured(*SETTINGS, *settings)

    def fail(self, state, *_):
        if state.step >= 3:
            raise ZeroDivisionError("by the test")

    failing = type("Failing", (Callback,), {method: fail})()
    with pytest.raises(ZeroDivisionError):
        train(config, run.ranks, callbacks=[failing])
    # The newest one may still have been in flight, as with any fault.
    assert list_checkpoints(run.folder)[-1].name == "step-00000001"
    train(config, run.ranks)
    assert list_checkpoints(run.folder)[0].name == "step-00000003"


def test_a_callback_does_nothing_by_default(run):
    callback = Callback()
    assert callback.on_step(RunState(), None) is None
    assert callback.on_validation(RunState(), {}) is None
    assert callback.on_checkpoint(RunState(), run.folder) is None


def status_of(run):
    return json.loads((run.folder / "status.json").read_text())


def page_of(run):
    return (run.folder / "report.html").read_text()


class Stop(Callback):
    """Asks the run to stop after a step, as SIGTERM does, or fails in it."""

    def __init__(self, step, error=None):
        self.step = step
        self.error = error

    def on_step(self, state, report):
        if state.step != self.step:
            return
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_report_says_that_the_run_trains_has_stopped_and_has_finished(run):
    config = run.configured(*SETTINGS, "max_steps=4")
    seen = []

    class Look(Callback):
        def on_step(self, state, report):
            seen.append(page_of(run))

    callbacks = [Look(), Stop(2)]
    with pytest.raises(RunStopped):
        train(config, run.ranks, callbacks=callbacks)
    # From the first step on; the next page is due later.
    assert seen and all("Training, step " in page for page in seen)
    status = status_of(run)
    assert status["state"] == "stopped" and status["total_steps"] == 4
    assert f"Stopped after step {status['step']} of 4" in page_of(run)
    assert "the same command goes on" in page_of(run)
    train(config, run.ranks)
    assert status_of(run)["state"] == "finished"
    assert "Finished after step 4 of 4" in page_of(run)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ZeroDivisionError("by the test"), "ZeroDivisionError: by the test."),
        (InputError("no such disk"), ": no such disk."),
    ],
)
def test_the_report_says_why_the_run_has_failed(run, error, words):
    config = run.configured(*SETTINGS, "max_steps=3")
    with pytest.raises(type(error)):
        train(config, run.ranks, callbacks=[Stop(2, error)])
    assert status_of(run)["state"] == "failed"
    assert "Failed after step 2 of 3" in page_of(run)
    assert words in page_of(run)


def test_a_report_that_cannot_be_written_ends_no_run(run, monkeypatch, capsys):
    real = trainer.reporting.run_report.write_report

    def failing(folder, **options):
        if status_of(run)["state"] == "training":
            raise OSError("by the test")
        return real(folder, **options)

    monkeypatch.setattr(trainer.reporting.run_report, "write_report", failing)
    train(run.configured(*SETTINGS, "max_steps=2"), run.ranks)
    assert (
        "the report stays as it was: OSError: by the test"
        in capsys.readouterr().err
    )
    assert status_of(run)["state"] == "finished"


def test_titles_are_looked_at_before_the_first_step(run, steps, tmp_path):
    file = tmp_path / "titles.csv"
    file.write_text("item_id,name\n1,x\n")
    config = run.configured(*SETTINGS, "max_steps=2")
    with pytest.raises(InputError, match="has no column 'title'"):
        train(config, run.ranks, titles=str(file))
    assert not steps and not run.folder.exists()
    train(config, run.ranks)
    look = json.loads((run.folder / "look.json").read_text())
    item = look["items"][0]["item"]
    file.write_text(f"item_id,title\n{item},A title of its own\n")
    train(config, run.ranks, titles=str(file))
    assert "A title of its own" in page_of(run)


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (50, [*range(1, 51), 52, 54, 56, 58, 60, 62, 64, 66, 68, 70, 72, 74]),
        (10, [*range(1, 51), 52, 54, 56, 58, 60, 62, 64, 66, 68, 70, 72, 74]),
        (2, [*range(1, 51), 52, 54, 56, 58, 60, 62, 64, 66, 68, 70, 72, 74]),
        (1, range(1, 75)),
    ],
)
def test_all_of_the_first_steps_are_logged_and_then_fewer(every, steps):
    context = SimpleNamespace(
        config=SimpleNamespace(log=SimpleNamespace(every=every)),
        at_last_step=False,
    )
    logged = []
    shown = []
    for step in range(1, 5001):
        context.state = RunState(step=step)
        context.is_shown_step = RunContext.is_shown_step.fget(context)
        if context.is_shown_step:
            shown.append(step)
        if RunContext.is_log_step.fget(context):
            logged.append(step)
    assert [step for step in logged if step < 75] == list(steps)
    assert set(shown) <= set(logged)
    assert set(shown) == {5, 10, 20, *range(every, 5001, every)}
    # In the end there is a line every `log.every` steps, and no more.
    assert [step for step in logged if step > 2500] == list(
        range(2500 + every, 5001, every)
    )
    assert len(logged) <= 5000 / every + 150
