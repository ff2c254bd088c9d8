"""What is published, what is refused, and that the pointer always names a model that loads."""

import fcntl
import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import trainer.files.lock
import trainer.retraining.publish
import trainer.serving.export
from embeddings.table import ItemTable
from tests.helpers.encoders import load_once
from tests.helpers.runs import (
    SmallRun,
    best_of,
    edit_json,
    finished_run,
    rank_of_one,
    records_read_once,
    seal,
    train,
)
from trainer.checkpoint.layout import RunState
from trainer.config.load import to_yaml
from trainer.config.retraining import PublishConfig
from trainer.config.serving import ExportConfig
from trainer.errors import InputError
from trainer.evaluation.evaluate_run import evaluate_run
from trainer.files.atomic import write_json
from trainer.retraining import registry
from trainer.retraining.publish import HeldOutPositions, publish
from trainer.retraining.registry import Registry, roll_back
from trainer.run_files import BEST
from trainer.serving.export import export_run


@pytest.fixture(scope="module")
def ranks():
    with rank_of_one() as ranks:
        yield ranks


# One encoder, and a small one: an export writes as many as there are predictions.
ONE_ENCODER = ("model.prediction=cross", "model.time_knots=0")


@pytest.fixture(scope="module")
def first(ranks, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("first"), ranks, *ONE_ENCODER)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Versions have the same encoder: the program that it is does not depend on when it is read."""
    with load_once(), records_read_once():
        yield


@pytest.fixture(scope="module")
def second(ranks, first, tmp_path_factory):
    """One that was trained for longer, on the same dataset."""
    run = SmallRun(tmp_path_factory.mktemp("second"), ranks)
    shutil.rmtree(run.dataset.folder)
    run.dataset = first.dataset
    run.config = run.configured(*ONE_ENCODER)
    run.save(train(run.trainer(), 5), RunState(step=5, best=best_of(5)))
    write_json(run.folder / BEST, best_of(5))
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    return run


@pytest.fixture(scope="module")
def exported(first, tmp_path_factory):
    """What an export of `first` leaves: making one takes a while, and most of these tests do not ask what is in it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_run(first.folder, folder, first.ranks, ExportConfig())
    return folder


@pytest.fixture
def quick(monkeypatch, exported):
    """Every export is that of `first`."""
    monkeypatch.setattr(
        trainer.retraining.publish,
        "export_run",
        lambda run, output, *others: shutil.copytree(exported, output),
    )


@pytest.fixture
def good(monkeypatch, quick):
    """good(first=, second=): every user's rank by a run; both are of 20 users, in turn of either domain."""

    def set_ranks(**rank_of):
        def of(served, drawn=None):
            name = next(
                name for name in rank_of if f"{name}0" in served.config.run
            )
            given = rank_of[name]
            rank_D = given if isinstance(given, tuple) else (given, given)
            domain_U = np.arange(served.dataset.users) % 2
            return HeldOutPositions(np.array(rank_D)[domain_U], domain_U)

        monkeypatch.setattr(trainer.retraining.publish, "_rank_test_items", of)

    return set_ranks


@pytest.fixture
def tables(monkeypatch):
    """How many tables there are in memory whenever one has been made; nothing is collected that the code does not collect."""
    modules, counts = [], []
    make = ItemTable.__init__

    def counted(self, *given, **named):
        make(self, *given, **named)
        modules.append(weakref.ref(self._kernel))
        counts.append(sum(module() is not None for module in modules))

    monkeypatch.setattr(ItemTable, "__init__", counted)
    gc.collect()
    gc.disable()
    yield counts
    gc.enable()


@pytest.fixture
def without_encoder(monkeypatch, exported):
    """An export reads its model and writes the items; the files are those of `first`."""

    def finish(export, output):
        shutil.rmtree(export.folder)
        shutil.copytree(exported, output)

    monkeypatch.setattr(trainer.serving.export, "_finish", finish)


def publish_it(run, folder, **options):
    return publish(run.folder, folder, run.ranks, PublishConfig(**options))


def serving(folder):
    """The run that current.json names, whose encoder loads; None where there is none."""
    if not (folder / "current.json").is_file():
        return None
    version = (
        folder / json.loads((folder / "current.json").read_text())["model"]
    )
    torch.export.load(version / "encoder.pt2")
    return json.loads((version.parent / "version.json").read_text())["run"]


def test_the_first_model_is_published_and_a_better_one_takes_its_place(
    first, second, tmp_path, good
):
    good(first=2, second=1)
    record = publish_it(first, tmp_path)
    assert (
        record["published"] == "0001"
        and record["against"] is None
        and not record["reasons"]
    )
    assert serving(tmp_path) == str(first.folder)
    record = publish_it(second, tmp_path)
    assert (
        record["published"] == "0002"
        and record["against"] == "0001"
        and serving(tmp_path) == str(second.folder)
    )
    figures = record["domains"]["domain 0"]
    assert (
        figures["candidate"] == 1
        and figures["current"]
        == pytest.approx(1 / np.log2(3))
        == figures["when_published"]
    )
    assert not (tmp_path / "refused.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "versions",
        "current.json",
        ".lock",
    }


def test_figures_are_those_of_both_models(first, second, tmp_path, quick):
    """By the models themselves: what evaluation gives on the newest items, and the same by two models of one dataset."""
    publish_it(first, tmp_path, tolerance=1.0)
    record = publish_it(
        second, tmp_path, tolerance=1.0, fall=1.0, domain_fall=1.0
    )
    for name, run in (("candidate", second), ("current", first)):
        expected = evaluate_run(run.folder, run.ranks)["domains"]
        for domain, figures in record["domains"].items():
            assert (
                figures[name] == pytest.approx(expected[domain]["NDCG@10"])
                and figures["users"] == expected[domain]["users"]
            )


def test_there_is_never_a_second_table(
    first, second, tmp_path, without_encoder, tables
):
    """The candidate's is read once; the current model's is read into the same one."""
    publish_it(first, tmp_path / "to", tolerance=1.0)
    assert tables == [1]
    assert (
        publish_it(
            second,
            tmp_path / "to",
            tolerance=1.0,
            fall=1.0,
            domain_fall=1.0,
            own_fall=1.0,
        )["published"]
        == "0002"
    )
    assert tables == [1, 1]
    evaluate_run(second.folder, second.ranks)
    assert tables == [1, 1, 1]


def test_a_table_of_another_width_is_made_when_the_other_is_gone(
    ranks, first, tmp_path, tables, quick
):
    wide = finished_run(tmp_path / "wide", ranks, "model.dim=16", *ONE_ENCODER)
    shutil.rmtree(wide.dataset.folder)
    shutil.copytree(first.dataset.folder, wide.dataset.folder)
    tables.clear()
    publish_it(first, tmp_path / "to", tolerance=1.0)
    publish_it(
        wide,
        tmp_path / "to",
        tolerance=1.0,
        fall=1.0,
        domain_fall=1.0,
        own_fall=1.0,
    )
    assert tables == [1, 1, 1]


def test_one_domain_that_is_worse_is_enough_to_refuse(
    first, second, tmp_path, good
):
    good(first=(2, 2), second=(1, 3))
    publish_it(first, tmp_path)
    record = publish_it(second, tmp_path)
    assert record["published"] is None and serving(tmp_path) == str(
        first.folder
    )
    reason, *_ = record["reasons"]
    assert reason.startswith(
        "domain 1: NDCG@10 0.5000, the current model has 0.6309"
    )
    assert json.loads((tmp_path / "refused.json").read_text()) == record
    assert (
        publish_it(second, tmp_path, tolerance=0.3)["published"] == "0002"
        and not (tmp_path / "refused.json").exists()
    )


def test_a_record_keeps_the_days_events_and_may_refuse_for_them(
    first, second, tmp_path, good
):
    good(first=2, second=1)
    publish_it(first, tmp_path)
    file = tmp_path / "arrivals.json"
    figures = {"now": 0.2, "before": 0.3, "error": 0.01, "users": 80}
    day = {"domains": {}, "against_recency": {"domain 0": figures}}
    file.write_text(json.dumps(day))
    paths = (second.folder, tmp_path, second.ranks)
    config = PublishConfig(below_recency="refuse")
    record = publish(*paths, config, arrivals=file)
    (reason,) = record["reasons"]
    assert reason.startswith("domain 0: the model that served ranked")
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused["arrivals"] == day
    record = publish(*paths, PublishConfig(), arrivals=file)
    assert record["published"] == "0002" and record["warnings"] == [reason]
    version = tmp_path / "versions/0002/version.json"
    assert json.loads(version.read_text())["arrivals"] == day
    file.write_text("{}")
    with pytest.raises(InputError, match=r"arrivals\.json: is no record"):
        publish(*paths, PublishConfig(), arrivals=file)


def test_a_small_domain_is_named_and_does_not_refuse(
    first, second, tmp_path, quick, monkeypatch
):
    """Of 20 users three are of the other domain, which falls; ten judge."""

    def rank_test_items(served, drawn=None):
        other_U = np.arange(served.dataset.users) >= 17
        fallen = "second0" in served.config.run
        position_U = np.where(other_U, 5 if fallen else 2, 2)
        return HeldOutPositions(position_U, other_U.astype(int))

    monkeypatch.setattr(
        trainer.retraining.publish, "_rank_test_items", rank_test_items
    )
    candidate = second.copied(tmp_path / "second0")
    evaluation = replace(second.config.evaluation, min_users=10)
    config = replace(second.config, evaluation=evaluation)
    (candidate.folder / "config.yaml").write_text(to_yaml(config))
    folder = tmp_path / "published"
    publish_it(first, folder)
    record = publish_it(candidate, folder)
    assert record["published"] == "0002" and record["min_users"] == 10
    assert record["notes"] == [
        "domain 1: 3 users, fewer than 10: it does not judge"
    ]
    assert {test["domain"] for test in record["tests"]} == {"domain 0", None}
    figures = record["domains"]["domain 1"]
    assert figures["candidate"] < figures["current"]


def test_the_night_of_a_version_of_before_is_judged_too(
    first, second, tmp_path, good
):
    """Its record has no standard errors: today's are taken."""
    good(first=(2, 2), second=(2, 2))
    publish_it(first, tmp_path)
    file = tmp_path / "versions/0001/version.json"
    record = json.loads(file.read_text())
    for figures in record["domains"].values():
        for key in ("candidate_error", "own_item_error"):
            del figures[key]
    file.write_text(json.dumps(record))
    record = publish_it(second, tmp_path)
    assert record["published"] == "0002"
    for figures in record["domains"].values():
        assert figures["when_published_error"] == 0


def test_newest_users_judge_where_there_are_enough(
    first, second, tmp_path, good, monkeypatch
):
    good(first=2, second=2)
    extension = first.dataset.folder / "extension"
    extension.mkdir()
    try:
        np.save(extension / "users.npy", np.array([0, 2, 4, 1]))
        record = publish_it(first, tmp_path, least_users=3)
    finally:
        shutil.rmtree(extension)
    assert [
        (figures["users"], figures["newest"])
        for figures in record["domains"].values()
    ] == [(3, True), (10, False)]


def test_the_same_run_again_is_no_new_version(first, tmp_path, quick):
    record = publish_it(first, tmp_path)
    assert (
        publish_it(first, tmp_path)["published"]
        == record["published"]
        == "0001"
    )
    assert [path.name for path in (tmp_path / "versions").iterdir()] == ["0001"]


class Killed(BaseException):
    pass


PLACES = {
    "begin_version": Registry,
    "export_run": trainer.retraining.publish,
    "check_version": registry,
    "point_to": Registry,
    "write_json": registry,
}


@pytest.mark.parametrize("name", PLACES)
def test_killed_anywhere_it_serves_what_loads_and_goes_on(
    first, second, tmp_path, good, monkeypatch, name
):
    good(first=2, second=1)
    publish_it(first, tmp_path)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PLACES[name], name, killed)
        publish_it(second, tmp_path)
    assert serving(tmp_path) == str(first.folder)
    publish_it(second, tmp_path)
    assert serving(tmp_path) == str(second.folder)
    assert not list((tmp_path / "versions").glob("*.partial"))


def test_an_export_that_does_not_load_is_not_published(
    first, tmp_path, exported, monkeypatch
):
    def broken(run, output, *others):
        shutil.copytree(exported, output)
        (output / "encoder.pt2").write_bytes(b"?")

    monkeypatch.setattr(trainer.retraining.publish, "export_run", broken)
    with pytest.raises(
        InputError, match=r"encoder\.pt2: is not as it was exported"
    ):
        publish_it(first, tmp_path)
    assert serving(tmp_path) is None


def test_back_to_the_version_before_and_forth_again(
    first, second, tmp_path, good
):
    good(first=2, second=1)
    publish_it(first, tmp_path)
    publish_it(second, tmp_path)
    assert roll_back(tmp_path)["number"] == "0001" and serving(tmp_path) == str(
        first.folder
    )
    with pytest.raises(
        InputError,
        match="there is no version before 0001: there are 0001, 0002",
    ):
        roll_back(tmp_path)
    assert roll_back(tmp_path, "0002")["number"] == "0002" and serving(
        tmp_path
    ) == str(second.folder)
    with pytest.raises(InputError, match="there is no version 0009"):
        roll_back(tmp_path, "0009")
    file = tmp_path / "versions/0001/model/domain-0/items.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"items\.npy: is not as it was exported"
    ):
        roll_back(tmp_path)
    assert serving(tmp_path) == str(second.folder)


def test_so_many_older_versions_stay(first, second, tmp_path, good):
    good(first=2, second=2)
    for run in (first, second, first, second):
        publish_it(run, tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == [
        "0002",
        "0003",
        "0004",
    ]


def test_after_9999_versions_the_numbers_go_on(first, second, tmp_path, good):
    good(first=2, second=2)
    for run in (first, second):
        publish_it(run, tmp_path)
    for old, new in (("0001", "9999"), ("0002", "10000")):
        version = tmp_path / "versions" / new
        (tmp_path / "versions" / old).rename(version)
        edit_json(version / "version.json", number=new)
    write_json(
        tmp_path / "current.json",
        {"version": "10000", "model": "versions/10000/model"},
    )
    assert publish_it(first, tmp_path)["number"] == "10001"
    assert roll_back(tmp_path)["number"] == "10000" and serving(
        tmp_path
    ) == str(second.folder)
    assert roll_back(tmp_path)["number"] == "9999" and serving(tmp_path) == str(
        first.folder
    )
    assert publish_it(second, tmp_path, keep=1)["number"] == "10002"
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == [
        "10001",
        "10002",
    ]


def test_two_at_once_do_not_harm_each_other(
    first, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(trainer.files.lock, "PATIENCE", 0.0)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process publishes here"):
            publish_it(first, tmp_path)
    assert publish_it(first, tmp_path)["published"] == "0001"


def test_a_pointer_that_is_none_is_named(first, tmp_path, quick):
    publish_it(first, tmp_path)
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(
        InputError, match=r"current\.json: cannot be used .*--rollback"
    ):
        publish_it(first, tmp_path)
    assert roll_back(tmp_path, "0001")["number"] == "0001" and serving(
        tmp_path
    ) == str(first.folder)


def test_a_candidate_that_is_damaged_changes_nothing(
    first, second, tmp_path, quick
):
    publish_it(first, tmp_path)
    spoiled = second.copied(tmp_path / "spoiled")
    folder = next((spoiled.folder / "checkpoints").iterdir())
    (folder / "dense.safetensors").write_bytes(b"?")
    seal(folder)
    with pytest.raises(InputError, match="cannot be read"):
        publish_it(spoiled, tmp_path)
    assert serving(tmp_path) == str(first.folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"fall": 2}, "fall is 2"),
        ({"keep": -1}, "keep is -1"),
        ({"least_users": 0}, "least_users is 0: give at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PublishConfig(**options)
