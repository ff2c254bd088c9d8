"""A retraining's stages with stand-ins for the scripts: in which order, from what, and gone on with."""

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import trainer.files.lock
from tests.helpers import HELPERS
from trainer.config.load import load_settings
from trainer.config.retraining import RetrainConfig
from trainer.errors import InputError, RunStopped
from trainer.retraining.item_drift import measure_drift
from trainer.retraining.job import retrain

pytestmark = pytest.mark.ranks  # they start processes

SCRIPTS = HELPERS.joinpath("fake_retrain")


@pytest.fixture
def day(tmp_path):
    """day(name, log=…, **settings): the result of a retraining."""

    def of(name, log=None, **settings):
        config = RetrainConfig(
            **(
                {
                    "folder": str(tmp_path),
                    "name": name,
                    "input": [log or f"{name}.parquet"],
                }
                | settings
            )
        )
        return retrain(config, SCRIPTS)

    return of


def calls(folder):
    return [
        line.split(" ", 2)
        for line in (folder / "calls.txt").read_text().splitlines()
    ]


def stages(folder):
    return [f"{name} {stage}" for name, stage, _ in calls(folder)]


def plan(folder, name):
    return json.loads((folder / "days" / name / "plan.json").read_text())


def test_day_after_day_each_begins_with_the_last(day, tmp_path):
    first = day("1", min_user=5, base=["a.yaml"], settings=["epochs=9"])
    assert (
        first["published"] == "0001"
        and first["extension"] is None
        and first["drift"] == {}
    )
    (_, _, prepare), (_, _, train), (_, _, publish) = calls(tmp_path)
    assert "--extend" not in prepare
    assert all(
        words in prepare
        for words in ("--keep-log", "--min-user 5", "--input 1.parquet")
    )
    assert (
        train
        == f"--config a.yaml data={tmp_path}/days/1/dataset run={tmp_path}/days/1/run epochs=9"
    )
    assert f"--to {tmp_path}/published" in publish
    second = day(
        "2",
        days=30.0,
        time_unit="s",
        retire=True,
        settings=["epochs=9"],
        warm_settings=["epochs=2", "seed=4"],
    )
    assert second["published"] == "0002" and second["extension"]["late"] == 2
    (_, _, prepare), (_, _, score), (_, _, train), _ = calls(tmp_path)[3:]
    assert (
        f"--extend {tmp_path}/days/1/dataset --retire" in prepare
        and "--days 30.0 --time-unit s" in prepare
    )
    assert score == (
        f"--of {tmp_path}/days/1/run --data {tmp_path}/days/2/dataset --split arrivals "
        f"--record {tmp_path}/days/2/arrivals.json"
    )
    assert train.endswith(
        f"epochs=9 warm_start={tmp_path}/days/1/run epochs=2 seed=4"
    )
    report = (tmp_path / "days/2/report.md").read_text()
    assert (
        "Published as version 0002." in report
        and "| shop | 3 | 0.5000 | 0.4000 | +0.0500 to +0.1500 | – |" in report
    )
    assert (
        "4 rows came; 1 had come before, 2 were late" in report
        and "Domains were laid out anew." in report
    )
    assert [name for name in second["seconds"]] == [
        "extending the dataset",
        "ranking the day's events",
        "training",
        "publishing",
    ]


def test_all_days_are_on_one_page(day, tmp_path):
    for name in ("1", "<b>2"):
        day(name, log="1.parquet")
    page = (tmp_path / "report.html").read_text()
    assert (
        "published as version 0002" in page
        and "&lt;b&gt;2" in page
        and "<b>2" not in page
    )
    for title in ("NDCG@10 day by day", "New items", "Time"):
        assert f"<h2>{title}</h2>" in page
    assert (
        page.count('<td class="better">0.5000</td>') == 2
    )  # a day each, the model until then has 0.4


def test_the_first_day_and_a_day_without_news_say_that_nothing_is_ranked(
    day, tmp_path, capsys
):
    """The figures of a day that has them are in its record, and what is below is warned of."""
    first = day("1")
    assert first["arrivals"] == {"skipped": "no model served yet"}
    assert "the day's events are not ranked: no model served" in (
        capsys.readouterr().out
    )
    second = day("2")
    assert second["arrivals"]["domains"]["shop"]["NDCG@10"] == 0.3
    assert second["warnings"] == ["shop: below recency popularity"]
    assert second["below_recency"] == ["shop"] and second["published"] == "0002"
    third = day("3", log="old.parquet")
    assert "are not ranked: no event is later" in capsys.readouterr().out
    assert third["arrivals"] == {"skipped": "no event is later"}
    reports = []
    for name in "123":
        reports.append((tmp_path / "days" / name / "report.md").read_text())
    assert "Not ranked: no model served yet." in reports[0]
    assert "| shop | 9 | 0.3000 | – | 0.4000 |" in reports[1]
    assert "- shop: below recency popularity" in reports[1]
    assert "Not ranked: no event is later." in reports[2]


@pytest.mark.parametrize("content", ["{", "[]", '{"against_recency": 3}'])
def test_a_record_of_arrivals_that_is_none_is_named(day, tmp_path, content):
    day("1")
    (tmp_path / "die-train").touch()
    with pytest.raises(InputError):
        day("2")
    file = tmp_path / "days/2/arrivals.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"days/2/arrivals\.json"):
        day("2")
    file.unlink()
    assert day("2")["published"] == "0002"


def test_a_day_that_is_done_stays_done(day, tmp_path):
    result = day("1")
    assert day("1") == result and len(calls(tmp_path)) == 3


STAGES = ["prepare", "evaluate", "train", "publish"]


@pytest.mark.parametrize("stage", STAGES)
def test_where_a_stage_dies_the_same_command_goes_on(day, tmp_path, stage):
    day("1")
    (tmp_path / f"die-{stage}").touch()
    with pytest.raises(
        InputError,
        match="ended with status 9: its own lines say why; the same command goes on there",
    ):
        day("2")
    assert not (tmp_path / "days/2/retrain.json").exists()
    assert day("2")["published"] == "0002"
    expected = STAGES[: STAGES.index(stage) + 1] + STAGES[STAGES.index(stage) :]
    assert stages(tmp_path)[3:] == [f"2 {name}" for name in expected]


@pytest.mark.parametrize("place", ["write_text", "_remove_old_days"])
def test_killed_after_it_was_published_it_is_not_published_again(
    day, tmp_path, monkeypatch, place
):
    day("1")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"trainer.retraining.job.{place}", killed)
        day("2")
    assert day("2")["published"] == "0002"
    assert len(list((tmp_path / "published/versions").iterdir())) == 2


def logs_of(folder, name):
    """The inputs that a day's dataset was made of, oldest first, each as often as it came in."""
    return (folder / "days" / name / "dataset/input.txt").read_text().split()


def test_the_logs_of_a_refused_day_come_along_with_the_next(
    day, tmp_path, capsys
):
    day("1")
    refused = day("2", log="bad.parquet")
    assert refused["published"] is None and refused["reasons"] == [
        "shop: worse"
    ]
    report = (tmp_path / "days/2/report.md").read_text()
    assert "**Not published.**" in report and "- shop: worse" in report
    assert "Its logs come along with the next day." in report
    assert "`leave_out=[2]`" in report
    assert "leave_out=[2]" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    third = day("3")
    assert third["published"] == "0002" and third["carried"] == ["2"]
    assert plan(tmp_path, "3")["extends"] == "days/2/dataset"
    assert logs_of(tmp_path, "3") == ["1.parquet", "bad.parquet", "3.parquet"]
    assert (tmp_path / "days/3/run/begun-with.txt").read_text() == str(
        tmp_path / "days/1/run"
    )
    for text in (
        capsys.readouterr().out,
        (tmp_path / "days/3/report.md").read_text(),
        (tmp_path / "report.html").read_text(),
    ):
        assert "The logs of 2 come along: refused days" in text
    fourth = day("4")
    assert fourth["carried"] == [] and plan(tmp_path, "4")["extends"] == (
        "days/3/dataset"
    )
    assert logs_of(tmp_path, "4") == [*logs_of(tmp_path, "3"), "4.parquet"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_repeated_each_refused_days_logs_come_once(
    day, tmp_path, stage
):
    day("1")
    day("2", log="bad.parquet")
    day("3", log="bad-too.parquet")
    (tmp_path / f"die-{stage}").touch()
    with pytest.raises(InputError):
        day("4")
    assert day("4")["carried"] == ["2", "3"]
    assert logs_of(tmp_path, "4") == [
        "1.parquet",
        "bad.parquet",
        "bad-too.parquet",
        "4.parquet",
    ]


def test_a_spoiled_day_is_left_out_where_it_is_named(day, tmp_path):
    day("1")
    day("2", log="bad.parquet")
    third = day("3", log="bad-too.parquet")
    assert third["carried"] == ["2"]
    fourth = day("4", leave_out=["2"])
    assert (fourth["carried"], fourth["left_out"]) == (["3"], ["2"])
    assert plan(tmp_path, "4")["extends"] == "days/1/dataset"
    assert logs_of(tmp_path, "4") == [
        "1.parquet",
        "bad-too.parquet",
        "4.parquet",
    ]
    report = (tmp_path / "days/4/report.md").read_text()
    assert "The logs of 2 are left out, as asked" in report
    assert day("5", leave_out=["2"])["left_out"] == []  # cron names it still
    assert logs_of(tmp_path, "5") == [*logs_of(tmp_path, "4"), "5.parquet"]


def test_a_day_that_was_left_out_once_stays_out(day, tmp_path):
    day("1")
    day("2", log="bad.parquet")
    assert day("3", log="bad-too.parquet", leave_out=["2"])["carried"] == []
    fourth = day("4")
    assert (fourth["carried"], fourth["left_out"]) == (["3"], ["2"])
    assert plan(tmp_path, "4")["extends"] == "days/3/dataset"
    assert logs_of(tmp_path, "4") == [
        "1.parquet",
        "bad-too.parquet",
        "4.parquet",
    ]


def test_whom_to_leave_out_may_be_told_until_the_dataset_is_there(
    day, tmp_path
):
    day("1")
    day("2", log="bad.parquet")
    with pytest.raises(
        InputError,
        match=r"leave_out names '9', which was not refused in .*: refused are 2",
    ):
        day("3", leave_out=["9"])
    (tmp_path / "die-prepare").touch()
    with pytest.raises(InputError):
        day("3")
    (tmp_path / "die-train").touch()
    with pytest.raises(InputError):
        day("3", leave_out=["2"])
    assert logs_of(tmp_path, "3") == ["1.parquet", "3.parquet"]
    with pytest.raises(
        InputError, match=r"was begun with leave_out \['2'\], not \[\]"
    ):
        day("3")
    assert day("3", leave_out=["2"])["published"] == "0002"


def test_after_a_rollback_refused_days_come_along_all_the_same(day, tmp_path):
    """Of days 2 (refused), 3 (published, rolled back), 4 (refused): 2 and 4, not 3."""
    day("1")
    day("2", log="bad.parquet")
    day("3")
    back = {"version": "0001", "model": "versions/0001/model"}
    (tmp_path / "published/current.json").write_text(json.dumps(back))
    assert day("4", log="bad-too.parquet")["carried"] == ["2"]
    assert logs_of(tmp_path, "4") == [
        "1.parquet",
        "bad.parquet",
        "bad-too.parquet",
    ]
    assert day("5")["carried"] == ["2", "4"]
    assert logs_of(tmp_path, "5") == [*logs_of(tmp_path, "4"), "5.parquet"]


def test_a_day_of_an_earlier_version_comes_along_too(day, tmp_path):
    """Its plan does not say what it is based on."""
    day("1")
    day("2", log="bad.parquet")
    file = tmp_path / "days/2/plan.json"
    old = json.loads(file.read_text())
    for key in ("base", "carried", "again", "leave_out", "left_out"):
        del old[key]
    file.write_text(json.dumps(old))
    assert day("3")["carried"] == ["2"]
    assert logs_of(tmp_path, "3") == ["1.parquet", "bad.parquet", "3.parquet"]


def test_a_refusal_is_known_whatever_status_a_launcher_gives(day, tmp_path):
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@" || exit 1\n')
    launcher.chmod(0o755)
    assert day("1", launcher=[str(launcher)])["published"] == "0001"
    assert (
        day("2", log="bad.parquet", launcher=[str(launcher)])["published"]
        is None
    )
    (tmp_path / "die-publish").touch()
    with pytest.raises(InputError, match="publishing ended with status 1"):
        day("3", launcher=[str(launcher)])


@pytest.fixture
def swallowing(tmp_path):
    """A launcher whose status is 0 whatever its child's was."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@" || exit 0\n')
    launcher.chmod(0o755)
    return [str(launcher)]


def test_a_launcher_that_says_0_of_a_refusal_is_not_believed(
    day, tmp_path, swallowing
):
    assert day("1", launcher=swallowing)["published"] == "0001"
    refused = day("2", log="bad.parquet", launcher=swallowing)
    assert refused["published"] is None and refused["reasons"] == [
        "shop: worse"
    ]
    assert "**Not published.**" in (tmp_path / "days/2/report.md").read_text()
    assert day("3", launcher=swallowing)["published"] == "0002"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "evaluate",
            "events ended with status 0, but .*/days/2/arrivals.json is not there",
        ),
        (
            "train",
            "training ended with status 0, but .*/days/2/run holds no test record",
        ),
        (
            "publish",
            "publishing ended with status 0, but .*/days/2/run neither serves nor was refused",
        ),
    ],
)
def test_a_launcher_that_says_0_of_a_death_is_not_believed(
    day, tmp_path, swallowing, stage, message
):
    day("1")
    (tmp_path / f"die-{stage}").touch()
    with pytest.raises(InputError, match=message):
        day("2", launcher=swallowing)
    assert (tmp_path / "days/2/trained").exists() == (stage == "publish")
    assert day("2", launcher=swallowing)["published"] == "0002"
    again = [f"2 {name}" for name in STAGES[STAGES.index(stage) :]]
    assert stages(tmp_path)[-len(again) :] == again


def test_what_was_published_is_known_whatever_status_a_launcher_gives(
    day, tmp_path
):
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        f'#!/bin/sh\n"{sys.executable}" "$@" || exit $?\ncase "$1" in *publish.py) exit 7; esac\n'
    )
    launcher.chmod(0o755)
    assert day("1", launcher=[str(launcher)])["published"] == "0001"


def test_after_a_rollback_the_next_day_extends_what_serves(day, tmp_path):
    for name in "12":
        day(name)
    pointer = tmp_path / "published/current.json"
    back = {"version": "0001", "model": "versions/0001/model"}
    pointer.write_text(
        json.dumps(back)
    )  # as launch/publish.py --rollback leaves it
    assert day("3")["published"] == "0003"
    assert plan(tmp_path, "3")["extends"] == "days/1/dataset"
    assert plan(tmp_path, "3")["warm_start"] == str(tmp_path / "days/1/run")
    assert plan(tmp_path, "3")["before"] == "versions/0001/model"
    day("4")
    assert plan(tmp_path, "4")["extends"] == "days/3/dataset"


def test_what_it_begins_from_is_fixed_when_it_first_begins(day, tmp_path):
    day("1")
    (tmp_path / "die-train").touch()
    with pytest.raises(InputError):
        day("2")
    day("3")
    assert day("2")["published"] == "0003"
    assert (tmp_path / "days/2/run/begun-with.txt").read_text() == str(
        tmp_path / "days/1/run"
    )
    (tmp_path / "die-train").touch()
    with pytest.raises(InputError):
        day("4")
    with pytest.raises(
        InputError,
        match=r"was begun with input \['4.parquet'\], not \['5.parquet'\]",
    ):
        day("4", log="5.parquet")


@pytest.mark.parametrize("stage", ["prepare", "train", "publish"])
def test_a_request_to_stop_reaches_the_stage_and_the_same_command_goes_on(
    day, tmp_path, stage
):
    (tmp_path / f"stop-{stage}").touch()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunStopped, match=r"was stopped, as asked; the same"):
        day("1")
    assert signal.getsignal(signal.SIGINT) == before
    assert day("1")["published"] == "0001"


def test_a_slip_does_not_burn_the_days_name(day, tmp_path):
    """Where nothing was made of the wrong input, the right one is taken."""
    (tmp_path / "die-prepare").touch()
    with pytest.raises(InputError, match="extending the dataset ended"):
        day("1", log="wrong.parquet")
    assert day("1", log="right.parquet")["number"] == 1
    assert plan(tmp_path, "1")["input"] == ["right.parquet"]


def test_a_folder_that_was_moved_goes_on(day, tmp_path):
    """Records have whole paths: the next day begins with the model where it is now."""
    old, new = tmp_path / "old", tmp_path / "new"
    day("1", folder=str(old))
    (old / "die-train").touch()
    with pytest.raises(InputError):
        day("2", folder=str(old))
    old.rename(new)
    assert day("1", folder=str(new))["published"] == "0001"
    assert day("2", folder=str(new))["published"] == "0002"
    begun_with = new / "days" / "2" / "run" / "begun-with.txt"
    assert begun_with.read_text() == str(new / "days" / "1" / "run")
    assert plan(new, "2")["extends"] == "days/1/dataset"
    day("3", folder=str(new), log="bad.parquet")
    assert day("4", folder=str(new), keep_days=1)["published"] == "0003"
    assert (new / "days" / "2" / "run").is_dir()  # it has served


def test_two_at_once_do_not_harm_each_other(day, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.files.lock, "PATIENCE", 0.0)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            InputError, match="another retraining is at work here"
        ):
            day("1")
    assert day("1")["published"] == "0001"


def test_old_days_make_room_but_not_those_that_serve(day, tmp_path):
    for name in "1234":
        day(name, keep_days=1)
    gone = (
        tmp_path / "published/versions/0002/version.json"
    )  # as launch/publish.py takes old versions away
    gone.write_text(
        json.dumps(json.loads(gone.read_text()) | {"run": "another"})
    )
    day("5", keep_days=1)
    there = {
        name: (tmp_path / "days" / name / "run").is_dir() for name in "12345"
    }
    assert there == {"1": True, "2": False, "3": True, "4": True, "5": True}
    assert (tmp_path / "days/2/report.md").is_file()


def export(folder, vectors, ids):
    (folder / "domain-0").mkdir(parents=True)
    np.save(folder / "domain-0" / "items.npy", np.array(vectors, np.float32))
    text = [each.encode() for each in ids]
    offsets = np.cumsum([0, *map(len, text)]).astype(np.int64)
    tensors = {
        "bytes": np.frombuffer(b"".join(text), np.uint8),
        "offsets": offsets,
    }
    save_file(tensors, folder / "domain-0" / "ids.safetensors")
    (folder / "schema.json").write_text(
        json.dumps({"domains": [{"name": "shop", "folder": "domain-0"}]})
    )


def test_drift_is_of_items_that_both_have(tmp_path):
    export(tmp_path / "old", [[1, 0], [0, 1], [3, 4]], ["a", "é", "gone"])
    export(
        tmp_path / "new",
        [[1, 1], [0, 5], [9, 9], [2, 0]],
        ["new", "é", "newer", "a"],
    )
    found = measure_drift(tmp_path / "old", tmp_path / "new")["shop"]
    assert (
        found["items"] == 2
        and found["mean"] == pytest.approx(1)
        and found["p5"] == pytest.approx(1)
    )
    export(tmp_path / "turned", [[0, 2], [0, 1]], ["a", "é"])
    assert measure_drift(tmp_path / "old", tmp_path / "turned")["shop"][
        "mean"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["name=1", "input=[a]"], "folder is missing"),
        (["folder=x", "input=[a]"], "name is missing"),
        (["folder=x", "name=1"], "input is missing"),
        (["folder=x", "name=a/b", "input=[a]"], "names a folder"),
        (["folder=x", "name=1", "input=[a]", "keep_days=0"], "keep_days is 0"),
        (["folder=x", "name=1", "input=[a]", "keeps=0"], "keeps"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        load_settings(RetrainConfig, [], settings)


HEAVY = ("torch", "deepspeed", "torchrec", "fbgemm_gpu", "duckdb")


@pytest.mark.parametrize("module", ["job", "report"])
def test_the_parent_process_loads_neither_pytorch_nor_an_engine(module):
    names = f"[name for name in {HEAVY} if name in sys.modules]"
    program = f"import sys, trainer.retraining.{module}; print({names})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
