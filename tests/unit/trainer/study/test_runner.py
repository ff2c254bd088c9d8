"""A study's runs, with stand-ins for the commands: what is run, tuned, kept, gone on with, and reported."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from tests.helpers import HELPERS
from tests.helpers.made import draw_histories, write_dataset
from tests.helpers.rank_processes import forked_python
from trainer.config.study import SYSTEM_NAMES, StudyConfig
from trainer.errors import InputError, RunStopped
from trainer.study.baselines import SYSTEMS as ALL_SYSTEMS
from trainer.study.report import write_study
from trainer.study.runner import run_study

pytestmark = pytest.mark.ranks  # they start processes

LAUNCH = HELPERS.joinpath("fake_launch")
SYSTEMS = ["SyNCRec", "w/o LC-NTG", "SDSR"]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The commands are forked where Arrow is loaded."""
    monkeypatch.setattr(sys, "executable", forked_python())


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", draw_histories(12)).folder


@pytest.fixture
def study(tmp_path, data):
    return lambda **settings: run_study(
        data,
        tmp_path / "out",
        [],
        StudyConfig(**{"systems": SYSTEMS} | settings),
        LAUNCH,
    )


def calls(tmp_path):
    return sorted(
        (tmp_path / "out" / "runs" / "calls.txt").read_text().splitlines()
    )


def test_every_system_has_its_runs_and_a_domain_alone_one_each(study, tmp_path):
    found = study(seeds=[0, 1], parallel=3)
    names = ["SyNCRec", "w_o_LC-NTG", "SDSR-domain_0", "SDSR-domain_1"]
    runs = [f"{name}-seed={seed}" for name in names for seed in (0, 1)]
    assert calls(tmp_path) == sorted(
        f"{what} {run}" for what in ("train", "evaluate") for run in runs
    )
    ours = found.results["SyNCRec"]
    assert (
        ours.user_U.tolist() == list(range(10))
        and ours.position["full"].tolist() == [list(range(1, 11))] * 2
    )
    alone = found.results["SDSR"]
    assert (
        alone.user_U.tolist() == list(range(10))
        and alone.domain_U.tolist() == [0, 1] * 5
    )
    assert (
        alone.seconds == [8.0, 8.0]
        and ours.seconds == [4.0, 4.0]
        and ours.epochs == [2, 2]
    )
    assert not list((tmp_path / "out").rglob("checkpoints"))


def test_a_peer_of_leave_one_out_has_no_place_in_a_split_by_time(
    study, tmp_path
):
    with pytest.raises(InputError, match="recbole: BPR, NARM learn and rank"):
        study(settings=["split.kind=timeline"], recbole={"BPR": {}, "NARM": {}})
    assert not (tmp_path / "out" / "runs").exists()


def test_what_is_done_stays_done(study, tmp_path):
    study()
    before = calls(tmp_path)
    study()
    assert calls(tmp_path) == before
    (tmp_path / "out/runs/SyNCRec-seed=0/run/ranks-test.parquet").unlink()
    study(seeds=[0, 1])
    again = ["evaluate SyNCRec-seed=0", "train SyNCRec-seed=0"]
    others = [line.replace("seed=0", "seed=1") for line in before]
    assert calls(tmp_path) == sorted([*before, *again, *others])


def test_other_settings_do_not_take_what_is_there(study, tmp_path):
    study()
    with pytest.raises(
        InputError,
        match="was made with other settings: remove it, or take another --output",
    ):
        study(settings=["model.dim=8"])


def test_the_best_by_validation_stands_for_a_system(study, tmp_path):
    found = study(
        tune={"model.dropout": [0.1, 0.4, 0.2]},
        seeds=[0, 5],
        systems=["SyNCRec", "SDSR"],
    )
    assert found.best_settings["SyNCRec"] == {"": ("model.dropout=0.4",)}
    assert [round(value, 3) for *_, value in found.trials["SyNCRec"]] == [
        0.1,
        0.4,
        0.2,
    ]
    assert "train SyNCRec-model.dropout=0.4-seed=5" in calls(tmp_path)
    assert "train SyNCRec-model.dropout=0.1-seed=5" not in calls(tmp_path)
    assert found.results["SyNCRec"].validation == [0.4, 0.4]


def test_a_run_that_fails_is_named_and_the_others_go_on(study, tmp_path):
    found = study(seeds=[0, 66], systems=["SyNCRec", "SASRec"])
    assert set(found.failed) == {"SyNCRec-seed=66", "SASRec-seed=66"}
    assert all(
        "train.py ended with status 1: error: the seed is 66" in why
        for why in found.failed.values()
    )
    assert found.results["SyNCRec"].position["full"].shape == (1, 10)
    page = write_study(tmp_path / "out", found).read_text()
    assert "SyNCRec-seed=66 is not in the tables" in page


def test_asked_to_stop_it_asks_its_runs(study, tmp_path):
    def stop():
        while not (tmp_path / "out/runs/calls.txt").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with pytest.raises(RunStopped, match="the same command goes on"):
        study(seeds=[77], systems=["SyNCRec", "SASRec"])
    assert signal.getsignal(signal.SIGTERM) == before
    assert calls(tmp_path) == ["train SyNCRec-seed=77"]


def test_the_report_says_who_gains_and_who_loses(study, tmp_path):
    found = study(seeds=[0, 1], sweep={"model.dim": [8, 16]})
    write_study(tmp_path / "out", found)
    text = (tmp_path / "out" / "report.md").read_text()
    ranks = np.arange(1, 11)
    means = [
        np.where(own <= 10, 1 / np.log2(own + 1), 0).mean()
        for own in (ranks[::2], ranks[1::2])
    ]
    both_means = [np.mean(means), np.mean(means)]
    cells = [f"{value:.4f} ± 0.0000" for value in (*means, *both_means)]
    full = text[text.index("## NDCG@10 by domain, all items") :]
    assert "| SyNCRec | " + " | ".join(f"**{cell}**" for cell in cells) in full
    assert "| test users | 5 | 5 | 10 | 10 |" in full
    assert "| popularity | 0.1000 | 0.1000 | 0.1000 | 0.1000 |" in full
    assert "| recency popularity | 0.1500 | 0.1500 | 0.1500 | 0.1500 |" in full
    few = "+0.0 % (few users)"
    none = "+0.0 % (p 1.000)"
    assert f"| SyNCRec | {few} | {few} | {none} | {none} |" in text
    better = next(
        line
        for line in text[text.index("## SyNCRec against each") :].splitlines()
        if line.startswith("| w/o LC-NTG")
    )
    assert better.count("+") >= 4 and "≤ 0.002" in better
    assert "No domain has 50 users: the mean is of all 2." in text
    assert "not converged" not in text and found.unconverged == {}
    assert "## SyNCRec by model.dim" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="better"' in page and "plotly" in page.lower()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"systems": ["SASRek"]},
            "there is no system 'SASRek': there are SyNCRec, ",
        ),
        ({"own": {"moon": []}}, "there is no system 'moon'"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [1, 1]}, "each once"),
        ({"parallel": 0}, "parallel is 0"),
        ({"systems": []}, "systems is empty"),
        (
            {"systems": ["SASRec"], "sweep": {"model.dim": [8]}},
            "sweep is of SyNCRec",
        ),
    ],
)
def test_what_cannot_be_studied_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**settings)


def test_a_folder_that_holds_something_else_is_left_alone(study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(
        InputError, match="already holds something that is no study"
    ):
        study()
    with pytest.raises(InputError, match=r"model.dim: give a list of values"):
        (tmp_path / "out" / "mine.txt").unlink()
        study(sweep={}, tune={"model.dim": 8})


def test_settings_know_every_system():
    assert tuple(ALL_SYSTEMS) == SYSTEM_NAMES
