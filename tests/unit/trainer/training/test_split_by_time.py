"""Training under a split by time: nothing after the cut is seen, and a run resumes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.made import draw_histories, draw_ticks, write_dataset
from tests.helpers.runs import SETTINGS
from trainer.checkpoint.layout import list_checkpoints
from trainer.config.load import load_config
from trainer.config.retraining import PublishConfig
from trainer.errors import InputError
from trainer.evaluation.evaluate_run import evaluate_run
from trainer.reporting.run_log import read_records
from trainer.retraining.publish import publish
from trainer.training.callbacks import Callback
from trainer.training.loop import train

CUT = 45_000
TEST = 56_000
USERS = 26
# Of a log whose times are ticks in seconds of the year 2001.
FIRST = 1e9


pytestmark = pytest.mark.usefixtures("without_report")


def dated(dataset):
    """The same with times that have a unit, written into its dataset.json."""
    file = dataset.folder / "dataset.json"
    record = json.loads(file.read_text())
    record |= {
        "format_version": 5,
        "tie_order": "hash",
        "tied_users": 0,
        "time_kind": "numbers",
        "time_unit": "s",
        "first_time": FIRST,
        "last_time": FIRST + 65535,
    }
    file.write_text(json.dumps(record))
    return dataset.folder


def date_of(tick):
    return str(np.datetime64(int(FIRST) + tick, "s"))


@pytest.fixture(scope="module")
def log():
    """(histories, ticks); the users 4–7 and 24 have nothing before the cut."""
    histories = draw_histories(USERS, longest=8)
    ticks = draw_ticks(histories)
    random = np.random.default_rng(1)
    for user in (4, 5, 6, 7, 24):
        late = random.integers(CUT, 65_536, len(ticks[user]))
        ticks[user] = np.sort(late).astype(np.uint16)
    return histories, ticks


def changed(log):
    """The same before the cut, and other events after it: other items, times and lengths."""
    histories, ticks = log
    random = np.random.default_rng(2)
    rows = np.array([0, 1, 2, 3, 4, 8, 9, 10, 11])
    new_histories = []
    new_ticks = []
    for history, times in zip(histories, ticks, strict=True):
        kept = int(np.count_nonzero(times < CUT))
        later = random.integers(0 if kept else 1, 6)
        late = np.sort(random.integers(CUT, 65_536, later))
        new_histories.append(
            np.concatenate([history[:kept], random.choice(rows, later)])
        )
        new_ticks.append(np.concatenate([times[:kept], late]).astype(np.uint16))
    return new_histories, new_ticks


def written(folder, log):
    histories, ticks = log
    dataset = write_dataset(
        folder / "data", histories, ticks=ticks, cuts=(8, 17), streams=1
    )
    return dated(dataset)


def configured(folder, data, *settings):
    return load_config(
        [],
        [
            f"data={data}",
            f"run={folder / 'run'}",
            *SETTINGS,
            "log.tensorboard=false",
            "evaluation.negatives=3",
            "evaluation.patience=0",
            "epochs=2",
            "split.kind=timeline",
            f"split.validation={date_of(CUT)}",
            f"split.test={date_of(TEST)}",
            *settings,
        ],
    )


def losses(folder):
    records = read_records(folder / "run" / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def weights(folder):
    newest = list_checkpoints(folder / "run")[0]
    files = ["dense.safetensors", "table-00000-of-00001.safetensors"]
    return {name: load_file(newest / name) for name in files}


def assert_same_weights(one, other):
    for file, arrays in one.items():
        assert arrays.keys() == other[file].keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(
                values, other[file][name], err_msg=name
            )


VARIANTS = {
    "shared negatives": [],
    "own negatives, other order": [
        "negatives.shared=0",
        "stream.shuffle=false",
    ],
    "limited tokens, sampled users": [
        "tokens_per_batch=12",
        "model.mutual_information_negatives=2",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_events_after_the_cut_train_the_same_model(
    group, log, tmp_path, variant
):
    settings = VARIANTS[variant]
    outcomes = []
    for name, events in (("one", log), ("other", changed(log))):
        folder = tmp_path / name
        data = written(folder, events)
        train(configured(folder, data, *settings), group)
        outcomes.append((losses(folder), weights(folder)))
    (one_losses, one), (other_losses, other) = outcomes
    assert np.isfinite(one_losses).all()
    assert one_losses == other_losses
    assert_same_weights(one, other)


class Stop(Exception):
    """In place of a machine that fails."""


class StopAt(Callback):
    """Fails after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state, report):
        if state.step == self.step:
            raise Stop


def test_a_run_resumes_where_it_was(group, log, tmp_path):
    settings = ["checkpoint.every_steps=3", "split.whose=all"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole_record = train(
        configured(whole, written(whole, log), *settings), group
    )
    config = configured(stopped, written(stopped, log), *settings)
    with pytest.raises(Stop):
        train(config, group, callbacks=[StopAt(5)])
    record = train(config, group)
    assert losses(stopped) == losses(whole)
    assert_same_weights(weights(whole), weights(stopped))
    del record["seconds"], whole_record["seconds"]
    assert record == whole_record
    other = configured(
        stopped, config.data, *settings, f"split.test={date_of(TEST + 999)}"
    )
    with pytest.raises(InputError, match=r"split\.test was .*, is .*"):
        train(other, group)


def test_evaluation_uses_the_cuts_of_the_run(group, log, tmp_path):
    folder = tmp_path / "one"
    record = train(configured(folder, written(folder, log), "epochs=1"), group)
    run = folder / "run"
    cuts = json.loads((run / "split.json").read_text())
    assert cuts["validation"] == "2001-09-09 14:16"
    for full in (False, True):
        again = evaluate_run(run, group, full=full)
        sampled = again["sampled"] if full else again
        for name in ("domains", "mean", "split", "unseen"):
            assert sampled[name] == record[name]
        assert again["split"] == record["split"]
    later = tmp_path / "later"
    histories, ticks = log
    histories = [*histories, np.array([0, 1, 2])]
    ticks = [*ticks, np.array([1, 60_000, 65_535], np.uint16)]
    other = evaluate_run(run, group, data=written(later, (histories, ticks)))
    assert other["split"]["test"] == record["split"]["test"]
    users = [
        sum(row["users"] for row in which["domains"].values())
        for which in (record, other)
    ]
    assert users[1] == users[0] + 1
    (run / "split.json").write_text("{}")
    with pytest.raises(InputError, match=r"split\.json: cannot be used"):
        evaluate_run(run, group)


def test_a_cut_that_cannot_be_used_leaves_no_run(group, log, tmp_path):
    folder = tmp_path / "one"
    data = written(folder, log)
    late = f"split.test={date_of(70_000)}"
    with pytest.raises(InputError, match=r"the log of .* is from 2001"):
        train(configured(folder, data, late), group)
    assert not (folder / "run").exists()


def test_a_model_that_knows_later_events_is_no_beginning(group, log, tmp_path):
    """A run of the same cut is one; that of leave-one-out is not. None of the past is published."""
    data = written(tmp_path, log)
    folders = {name: tmp_path / name for name in ("past", "all", "next")}
    short = ["epochs=1", "max_steps=2"]
    train(configured(folders["past"], data, *short), group)
    train(
        configured(folders["all"], data, *short, "split.kind=leave_one_out"),
        group,
    )
    begun = {}
    for name in ("past", "all"):
        begun[name] = configured(
            folders["next"], data, *short, f"warm_start={folders[name]}/run"
        )
    with pytest.raises(InputError, match=r"all/run has learnt from events"):
        train(begun["all"], group)
    assert not (folders["next"] / "run").exists()
    train(begun["past"], group)
    with pytest.raises(InputError, match="has not learnt from its newest days"):
        publish(
            folders["past"] / "run",
            tmp_path / "published",
            group,
            PublishConfig(),
        )
