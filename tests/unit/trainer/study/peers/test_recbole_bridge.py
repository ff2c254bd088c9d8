"""Our side of the bridge, with a stand-in for the other environment; RecBole itself is met in test_recbole.py."""

import json
import os
import stat
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import HELPERS
from tests.helpers.made import draw_histories, write_dataset
from trainer.data.split import SPLIT_LENGTH
from trainer.errors import InputError
from trainer.study.peers.recbole_bridge import (
    RANKS,
    RESULT,
    default_python,
    recbole_models,
    run_recbole,
)

pytestmark = pytest.mark.ranks  # they start processes

HISTORIES = draw_histories(12)


class Bridge:
    """run_recbole on a small dataset, and what it said."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.run, self.lines = folder, folder / "run", []
        self.dataset = write_dataset(folder / "data", HISTORIES)
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{HELPERS.joinpath("fake_peer.py")}" "$@"\n'
        )
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CALLS", str(folder / "calls"))

    def __call__(self, model="BPR", seed=1, python=None, **settings):
        return run_recbole(
            self.dataset,
            self.run,
            model,
            seed,
            python or self.python,
            say=self.lines.append,
            **settings,
        )

    @property
    def tasks(self):
        """What was asked of the other side."""
        calls = self.folder / "calls"
        return (
            [json.loads(line) for line in calls.read_text().splitlines()]
            if calls.exists()
            else []
        )


@pytest.fixture
def bridge(tmp_path, monkeypatch):
    return Bridge(tmp_path, monkeypatch)


def test_a_run_leaves_ranks_by_user_and_domain_and_what_was_found(bridge):
    found = bridge(
        options={"learning_rate": 0.01}, epochs=4, patience=1, minutes=5
    )
    table = pq.read_table(bridge.run / RANKS)
    assert table.schema.types == [
        pa.int64(),
        pa.int32(),
        pa.int32(),
        pa.int32(),
        pa.int64(),
        pa.bool_(),
        pa.int32(),
        pa.int32(),
    ]
    users = [
        user
        for user, history in enumerate(HISTORIES)
        if len(history) >= SPLIT_LENGTH
    ]
    domains = [
        int(bridge.dataset.domain_of(HISTORIES[user][-1])) for user in users
    ]
    # By leave-one-out a user has one target, which has the user's number.
    expected = {"user": users, "domain": domains, "target": users}
    # All items are seen, and RecBole's models have no recency term.
    expected |= {"seen": [True] * len(users)}
    for name in ("sampled_with_recency", "full_with_recency"):
        expected[name] = [0] * len(users)
    expected |= {
        name: [first + place for place in range(len(users))]
        for name, first in (("sampled", 1), ("full", 7))
    }
    assert table.to_pydict() == expected
    assert found == json.loads((bridge.run / RESULT).read_text())
    assert (
        found["validation"] == 0.25
        and found["best_epoch"] == 0
        and len(found["epochs"]) == 2
    )
    assert found["users"] == len(users) and found["too_short"] == len(
        HISTORIES
    ) - len(users)
    (task,) = bridge.tasks
    assert found["task"] == task
    assert task["dataset"] == bridge.dataset.fingerprint
    assert {name: task[name] for name in ("model", "seed", "options", "epochs", "patience", "minutes")} == {
        "model": "BPR", "seed": 1, "options": {"learning_rate": 0.01}, "epochs": 4, "patience": 1, "minutes": 5,
    }  # fmt: skip
    assert sorted(os.listdir(bridge.run)) == [
        "ranks.parquet",
        "recbole.log",
        "result.json",
    ]


def test_progress_is_told_with_the_time_left(bridge):
    bridge()
    first, second = [line for line in bridge.lines if " of " in line]
    assert (
        first
        == "BPR: epoch 1 of 4, validation NDCG@10 0.2500 (best 0.2500, epoch 1), at most 3 min left"
    )
    assert second.endswith("at most 2 min left")
    assert (
        bridge.lines[-1]
        == "BPR: 2 epochs in 2 min (patience), NDCG@10 0.2500 in epoch 1"
    )


def test_time_left_heeds_the_limit(bridge):
    bridge(minutes=1.5)
    assert [
        line.rpartition("most ")[2] for line in bridge.lines if " of " in line
    ] == [
        "30 s left",
        "0 s left",
    ]


def test_a_finished_run_is_not_done_again_even_without_the_environment(bridge):
    found = bridge("bpr")
    assert bridge("BPR", python="/nowhere") == found and len(bridge.tasks) == 1
    assert bridge.lines[-1].startswith("BPR: done already")


def test_another_run_in_the_folder_is_refused_with_what_differs(bridge):
    bridge()
    with pytest.raises(
        InputError,
        match="run: holds a run with another seed, epochs: take another folder",
    ):
        bridge(seed=2, epochs=7)
    with pytest.raises(InputError, match="another model"):
        bridge("STAMP")
    assert len(bridge.tasks) == 1


def test_without_its_ranks_a_run_is_done_again(bridge):
    bridge()
    (bridge.run / RANKS).unlink()
    bridge()
    assert len(bridge.tasks) == 2 and (bridge.run / RANKS).exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "fails",
            r"^RecBole's BPR failed \(status 1\): ValueError: Training loss is nan \(more in .*run/recbole.log\)$",
        ),
        (
            "dies",
            r"^RecBole's BPR failed \(signal 9\): a warning \(more in .*recbole.log\)$",
        ),
        ("refuses", r"^RecBole has no option learning_rat: learning_rate\?$"),
    ],
)
def test_what_fails_is_one_line_leaves_no_result_and_can_be_done_again(
    bridge, monkeypatch, what, message
):
    monkeypatch.setenv("FAKE_PEER", what)
    with pytest.raises(InputError, match=message):
        bridge()
    assert os.listdir(bridge.run) == ["recbole.log"]
    monkeypatch.delenv("FAKE_PEER")
    assert bridge()["validation"] == 0.25


def test_the_other_side_ends_where_ours_does(bridge, monkeypatch):
    monkeypatch.setenv("FAKE_PEER", "hangs")
    pids = []

    def interrupt(line):
        if "epoch 2" in line:
            while not (bridge.run / "work" / "pid").exists():
                pass
            pids.append(int((bridge.run / "work" / "pid").read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recbole(
            bridge.dataset, bridge.run, "BPR", 1, bridge.python, say=interrupt
        )
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_models_share_what_was_handed_over(bridge, monkeypatch):
    given = bridge.folder / "given"
    bridge(given=given)
    monkeypatch.setattr("trainer.study.peers.bridge.export_dataset", None)
    bridge.run = bridge.folder / "other"
    bridge("STAMP", given=given)
    with pytest.raises(
        InputError,
        match="given: was handed over of another dataset, seed or number of negatives",
    ):
        run_recbole(
            bridge.dataset,
            bridge.folder / "third",
            "BPR",
            1,
            bridge.python,
            evaluation_seed=5,
            given=given,
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("SASRek", r"^RecBole has no model SASRek: SASRec\?$"),
        ("Transformer", r"^RecBole has no model Transformer$"),
        (
            "S3Rec",
            r"^RecBole's S3Rec cannot be compared here: it is pretrained$",
        ),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(bridge, model, message):
    with pytest.raises(InputError, match=message):
        bridge(model)
    assert not bridge.run.exists()


def test_a_missing_environment_says_how_to_make_it(bridge, monkeypatch):
    message = r"/nowhere/python is no Python that can be run: make it with `make peers`, or .*--recbole-python"
    with pytest.raises(InputError, match=message):
        bridge(python="/nowhere/python")
    with pytest.raises(
        InputError, match="has no RecBole: make it with `make peers`"
    ):
        recbole_models(sys.executable)  # ours
    monkeypatch.setenv("FAKE_PEER", "no recbole")
    with pytest.raises(InputError, match="has no RecBole"):
        bridge()


def test_the_environment_may_be_named_from_here(bridge, monkeypatch):
    monkeypatch.chdir(bridge.folder)
    assert bridge(python="./python")["validation"] == 0.25


def test_the_environment_is_the_named_one_or_that_of_make_peers(monkeypatch):
    monkeypatch.setenv("RECBOLE_PYTHON", "/other/python")
    assert default_python() == Path("/other/python")
    monkeypatch.delenv("RECBOLE_PYTHON")
    root = HELPERS.parents[1]
    assert default_python() == root / ".venv-peers" / "bin" / "python"
