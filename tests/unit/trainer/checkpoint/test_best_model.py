"""A finished run's best model, read back for inference."""

import dataclasses
import shutil

import pytest
import torch

from tests.helpers.runs import best_of, finished_run, rank_of_one
from trainer.checkpoint.best_model import (
    TableSlot,
    TrainedModel,
    load_trained_model,
    open_run,
    open_trained_model,
)
from trainer.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks:
        yield finished_run(tmp_path_factory.mktemp("made"), ranks)


def test_a_trained_model_has_all_that_inference_needs(run):
    trained = open_trained_model(run.folder, run.ranks)
    assert isinstance(trained, TrainedModel)
    assert trained.run == run.folder
    assert trained.config == run.config
    assert trained.dataset.fingerprint == run.dataset.fingerprint
    assert trained.checkpoint == best_of(3)
    assert not trained.model.training
    assert trained.table.rows == run.dataset.num_embeddings
    with pytest.raises(dataclasses.FrozenInstanceError):
        trained.run = run.folder


def test_a_model_is_the_same_where_the_run_is_open_already(run):
    trained = open_trained_model(run.folder, run.ranks)
    config, dataset = open_run(run.folder)
    again = load_trained_model(run.folder, config, dataset, run.ranks)
    assert again.checkpoint == trained.checkpoint
    state = trained.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    rows = torch.arange(dataset.num_embeddings)
    with torch.no_grad():
        assert torch.equal(again.table(rows), trained.table(rows))


def test_a_slot_takes_one_table_for_models_of_one_shape(run):
    slot = TableSlot()
    first = open_trained_model(run.folder, run.ranks, slot=slot)
    second = open_trained_model(run.folder, run.ranks, slot=slot)
    assert first.table is second.table


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}: is no run"):
        open_trained_model(tmp_path, run.ranks)


@pytest.fixture
def project(run, tmp_path):
    """A folder of data/all and runs/1, where it was trained by relative paths."""
    folder = tmp_path / "project"
    shutil.copytree(run.config.data, folder / "data" / "all")
    shutil.copytree(run.folder, folder / "runs" / "1")
    config = folder / "runs" / "1" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        key = line.partition(":")[0]
        line = {"data": "data: data/all", "run": "run: runs/1"}.get(key, line)
        lines.append(line)
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("moved", [False, True])
def test_a_relative_dataset_is_found_from_any_folder(
    project, run, tmp_path, monkeypatch, moved
):
    if moved:
        project = project.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(project / "runs")
    for folder in ("1", project / "runs" / "1"):
        _, dataset = open_run(folder, ranks=run.ranks)
        assert dataset.fingerprint == run.dataset.fingerprint


def test_another_dataset_of_the_working_folder_is_not_taken(
    project, run, tmp_path, monkeypatch
):
    """A relative path was one of the folder in which the run was begun."""
    other = tmp_path / "data" / "all"
    shutil.copytree(run.config.data, other)
    (other / "dataset.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _, dataset = open_run(project / "runs" / "1", ranks=run.ranks)
    assert dataset.fingerprint == run.dataset.fingerprint


def test_a_dataset_that_is_gone_is_asked_for(project, run):
    shutil.rmtree(project / "data")
    with pytest.raises(InputError, match=r"was trained on data/all, .* --data"):
        open_run(project / "runs" / "1", ranks=run.ranks)
    _, dataset = open_run(project / "runs" / "1", run.config.data)
    assert dataset.fingerprint == run.dataset.fingerprint
