import copy
import json
import shutil
from dataclasses import replace

import pytest

from tests.helpers.runs import SmallRun, best_of, rank_of_one
from trainer.checkpoint.layout import RunState, list_checkpoints
from trainer.checkpoint.resume import (
    check_run_folder,
    find_start,
    list_changes,
    remove_failed_start,
)
from trainer.config.load import flatten_config
from trainer.errors import InputError
from trainer.run_files import BEST, DENSE

# The run's folder.


def test_a_new_or_empty_folder_may_be_used(tmp_path):
    assert (
        check_run_folder(str(tmp_path / "new" / "run"))
        == tmp_path / "new" / "run"
    )
    assert check_run_folder(str(tmp_path), fresh=True) == tmp_path
    assert (
        list(tmp_path.iterdir()) == []
    )  # nothing is made: what cannot begin leaves nothing


def test_a_runs_folder_may_be_used_unless_it_is_to_be_fresh(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert check_run_folder(str(tmp_path)) == tmp_path
    with pytest.raises(
        InputError,
        match=rf"^{tmp_path}: already holds a run; .* leave out --fresh",
    ):
        check_run_folder(str(tmp_path), fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "config.yaml").mkdir()
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(
            InputError,
            match=f"^{place}: already holds something that is no run; give a new folder as run=DIR",
        ):
            check_run_folder(str(place), fresh)


def test_a_folder_has_to_be_given():
    with pytest.raises(InputError, match=r"^run=DIR is missing"):
        check_run_folder("")


def test_what_a_run_that_could_not_begin_wrote_is_taken_away(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    remove_failed_start(run)
    assert not run.exists()


@pytest.mark.parametrize(
    "there", ["checkpoints/step-00000003/state.json", BEST]
)
def test_a_checkpoint_or_a_model_is_not_taken_away(tmp_path, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("{}")
    remove_failed_start(tmp_path)
    assert (tmp_path / there).exists()


# Where the run goes on from.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run with checkpoints of steps 2 and 3, the best model being that of step 1."""
    with rank_of_one() as ranks:
        run = SmallRun(
            tmp_path_factory.mktemp("made"),
            ranks,
            "optimizer.schedule=constant",
            "evaluation.patience=3",
        )
        trainer = run.trainer()
        for state in (
            RunState(1, 1, best_of(1)),
            RunState(2, 2, best_of(1), 1),
            RunState(3, 3, best_of(1), 2, 5, 7.5),
        ):
            run.save(trainer, state)
        yield run


@pytest.fixture
def run(pristine, tmp_path):
    """A copy, for one test."""
    return pristine.copied(tmp_path / "run")


def start(run, *settings, **options):
    config = run.configured(
        "optimizer.schedule=constant", "evaluation.patience=3", *settings
    )
    return find_start(run.folder, config, run.dataset, run.ranks, **options)


def spoil(folder):
    (folder / DENSE).write_bytes(b"")


def test_a_run_without_checkpoints_begins(run, tmp_path):
    assert find_start(tmp_path / "new", run.config, run.dataset, run.ranks) == (
        None,
        RunState(),
    )


def test_the_newest_checkpoint_is_gone_on_from(run, capsys):
    folder, state = start(run)
    assert folder == run.folder / "checkpoints/step-00000003"
    assert state == RunState(3, 3, best_of(1), 2, 5, 7.5)
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_gone_on_from(
    run, capsys
):
    spoil(list_checkpoints(run.folder)[0])
    folder, state = start(run)
    assert folder.name == "step-00000002" and state.step == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(
            f"rank 0: {run.folder}/checkpoints/step-00000003/{DENSE} has 0 bytes"
        )
        and told.count("\n") == 1
    )


@pytest.mark.parametrize("accept_changes", [False, True])
def test_where_all_checkpoints_are_damaged_nothing_begins_anew(
    run, accept_changes
):
    for folder in list_checkpoints(run.folder):
        spoil(folder)
    with pytest.raises(
        InputError,
        match=rf"^{run.folder}: none of its 3 checkpoints is whole: .* run=DIR$",
    ):
        start(run, accept_changes=accept_changes)
    assert len(list_checkpoints(run.folder)) == 3


@pytest.mark.parametrize(
    "content", [None, "{", json.dumps(best_of(3)), json.dumps(best_of(99))]
)
def test_best_json_is_put_back_to_what_the_checkpoint_says(run, content):
    """The run was killed after a better validation, whose checkpoint is not whole, or between the two files."""
    (run.folder / BEST).unlink()
    if content is not None:
        (run.folder / BEST).write_text(content)
    _, state = start(run)
    assert (
        json.loads((run.folder / BEST).read_text()) == state.best == best_of(1)
    )


def test_without_a_validation_there_is_no_best_json(run):
    run.save(run.trainer(), RunState(4))
    (run.folder / BEST).write_text(json.dumps(best_of(3)))
    _, state = start(run)
    assert (
        state.step == 4
        and state.best is None
        and not (run.folder / BEST).exists()
    )


@pytest.mark.parametrize("damage", [spoil, shutil.rmtree])
def test_a_best_model_that_is_lost_is_told_and_forgotten(run, capsys, damage):
    damage(run.folder / "checkpoints/step-00000001")
    folder, state = start(run)
    assert folder.name == "step-00000003" and state == RunState(
        3, 3, None, 0, 5, 7.5
    )
    assert not (run.folder / BEST).exists()
    told = capsys.readouterr().err
    assert (
        told.startswith(f"rank 0: {run.folder}/checkpoints/step-00000001/")
        and told.count("\n") == 1
    )
    assert told.endswith(
        "the best model so far is lost, the next validation begins anew\n"
    )


def test_the_best_model_may_be_the_checkpoint_itself(run, capsys):
    state = RunState(5, 5, best_of(5), 0)
    run.save(run.trainer(), state)
    assert start(run)[1] == state and json.loads(
        (run.folder / BEST).read_text()
    ) == best_of(5)
    assert capsys.readouterr().err == ""


# What may have changed in between.


def test_what_decides_a_step_may_not_change(run, capsys):
    with pytest.raises(InputError) as error:
        start(run, "seed=5", "model.eta=0.5")
    assert str(error.value) == (
        f"{run.folder}: its checkpoint was made otherwise: model.eta was 0.9, is 0.5; seed was 0, is 5: put it back, give a "
        "new folder as run=DIR, or go on with --accept-changes"
    )
    folder, _ = start(run, "seed=5", "model.eta=0.5", accept_changes=True)
    assert folder.name == "step-00000003"
    told = capsys.readouterr().err
    assert (
        told
        == "rank 0: goes on though it was made otherwise: model.eta was 0.9, is 0.5; seed was 0, is 5\n"
    )


def test_a_long_list_is_cut(run):
    settings = flatten_config(run.config)
    others = {key: "other" for key in settings if key.startswith("model.")}
    trainer, writer = run.trainer(), run.checkpoints(config=settings | others)
    writer.save(trainer.engine, trainer.table, RunState(6))
    writer.finish()
    with pytest.raises(InputError) as error:
        start(run)
    text = str(error.value)
    assert (
        text.count(" was other, is ") == 12
        and f"; and {len(others) - 12} more: put it back" in text
    )


def test_another_dataset_is_refused(run):
    other = copy.copy(run.dataset)
    other.__dict__["fingerprint"] = "other"
    with pytest.raises(
        InputError,
        match=rf"made otherwise: the dataset {run.dataset.folder} has other contents: put it back",
    ):
        find_start(run.folder, run.config, other, run.ranks)
    assert (
        find_start(
            run.folder, run.config, other, run.ranks, accept_changes=True
        )[1].step
        == 3
    )


def changed(run, before, now, dataset="same"):
    return list_changes({"config": before, "dataset": "same"}, now, dataset)


# Where things lie, how fast they go, how far, what is said and kept of them.
FREE = {
    "data",
    "run",
    "timeout_minutes",
    "deterministic",
    "accumulation",
    "epochs",
    "max_steps",
    "optimizer.zero_stage",
}
FREE |= {
    f"stream.{name}"
    for name in (
        "workers",
        "prefetch",
        "verify",
        "damaged",
        "cache",
        "cache_bytes",
    )
}
FREE |= {
    f"stream.{name}"
    for name in ("attempts", "retry_seconds", "timeout_seconds", "read_ahead")
}
FREE |= {
    f"evaluation.{name}"
    for name in (
        "batch_size",
        "every_epochs",
        "min_users",
        "patience",
        "recency_term",
    )
}
FREE |= {
    f"checkpoint.{name}"
    for name in ("every_steps", "every_minutes", "every_epochs", "keep")
}
FREE |= {
    f"log.{name}"
    for name in (
        "console",
        "every",
        "project",
        "prometheus",
        "tensorboard",
        "trackers",
    )
}
FREE |= {
    f"profile.{name}" for name in ("steps", "phases", "memory", "peak_tflops")
}
FREE |= {
    f"table.{name}"
    for name in ("placement", "cache_share", "device_share", "group_size")
}
FREE |= {"deepspeed.zero_optimization.reduce_bucket_size"}


def test_settings_that_decide_what_is_computed_are_listed_and_no_others(run):
    settings, free = flatten_config(run.config), set()
    for key, value in settings.items():
        found = changed(run, settings | {key: "other"}, run.config)
        assert found in ([], [f"{key} was other, is {value}"])
        free |= {key} if not found else set()
    assert free == FREE
    assert changed(run, settings, run.config) == []


def test_settings_that_one_of_the_two_does_not_know_are_listed(run):
    settings = flatten_config(run.config)
    without = {
        key: value for key, value in settings.items() if key != "model.eta"
    }
    assert changed(run, without, run.config) == [
        "model.eta was not set, is 0.9"
    ]
    assert changed(run, settings | {"model.older": 3}, run.config) == [
        "model.older was 3, is not set"
    ]
    assert changed(run, settings | {"checkpoint.older": 3}, run.config) == []
    assert changed(run, settings | {"model.older": "x" * 500}, run.config) == [
        f"model.older was {'x' * 80}, is not set"
    ]


def test_the_dataset_counts_by_its_contents(run):
    settings = flatten_config(run.config)
    assert changed(run, settings | {"data": "elsewhere"}, run.config) == []
    assert changed(run, settings, run.config, "other") == [
        f"the dataset {run.config.data} has other contents"
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("key", "value"), [("epochs", 20), ("max_steps", 0)])
def test_a_longer_run_is_another_one_where_the_rate_falls_towards_its_end(
    run, schedule, key, value
):
    config = replace(
        run.config, optimizer=replace(run.config.optimizer, schedule=schedule)
    )
    expected = [] if schedule == "constant" else [f"{key} was 999, is {value}"]
    assert changed(run, flatten_config(config) | {key: 999}, config) == expected


def test_where_deepspeed_keeps_things_may_change(run):
    """By ZeRO's stage, as a key of ours or in DeepSpeed's own JSON; what it computes with may not."""
    plain = run.config
    sharded = replace(plain, deepspeed={"zero_optimization": {"stage": 3}})
    other = replace(
        plain,
        deepspeed={
            "zero_optimization": {"stage": 2},
            "communication_data_type": "bf16",
        },
    )
    assert changed(run, flatten_config(sharded), other) == [
        "deepspeed.communication_data_type was not set, is bf16"
    ]
    assert (
        changed(
            run,
            flatten_config(plain),
            replace(plain, optimizer=replace(plain.optimizer, zero_stage=3)),
        )
        == []
    )
    assert changed(run, flatten_config(plain), sharded) == []
    assert changed(run, flatten_config(sharded), plain) == []


def test_a_run_that_cannot_begin_takes_away_its_own_files_alone(tmp_path):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/notes.txt",
        "tensorboard/events",
        "nccl/rank-0",
        "trackers.json",
        "wandb/offline-run-1/files",
        ".lock",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    remove_failed_start(tmp_path / "run")
    left = [
        path.relative_to(tmp_path / "run")
        for path in (tmp_path / "run").rglob("*")
    ]
    assert sorted(map(str, left)) == [
        ".lock",
        "checkpoints",
        "checkpoints/notes.txt",
    ]
    (tmp_path / "run" / "checkpoints" / "notes.txt").unlink()
    remove_failed_start(tmp_path / "run")
    assert not (tmp_path / "run").exists()
