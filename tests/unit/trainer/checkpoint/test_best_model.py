"""A finished run's best model, read back for inference."""

import dataclasses

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
