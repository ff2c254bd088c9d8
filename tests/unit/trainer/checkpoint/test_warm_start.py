"""A run that begins with another's best model, on a dataset that has changed since."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tests.helpers.made import ROOM, draw_histories, write_dataset
from tests.helpers.runs import SmallRun, finished_run, rank_of_one, seal
from trainer.checkpoint.best_model import load_trained_model
from trainer.checkpoint.warm_start import find_warm_start
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.errors import InputError
from trainer.training.step import Trainer

OLD_IDS = [["a0", "a1", "a2", "a3", "a4"], ["b0", "b1", "b2", "b3"]]


@pytest.fixture(scope="module")
def ranks():
    with rank_of_one() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def old(ranks, tmp_path_factory):
    """A finished run of two domains of 5 and 4 items; its config names its dataset."""
    folder = tmp_path_factory.mktemp("old")
    shutil.rmtree(folder)
    run = finished_run(folder, ranks)
    shutil.rmtree(run.dataset.folder)
    ids = {"item_ids": OLD_IDS}
    dataset = write_dataset(folder / "data", draw_histories(20), **ids)
    state = next((run.folder / "checkpoints").iterdir()) / "state.json"
    facts = json.loads(state.read_text())
    state.write_text(json.dumps(facts | {"dataset": dataset.fingerprint}))
    seal(state.parent)
    run.dataset = dataset
    return run


def grown(
    tmp_path, ranks, old, *settings, items=(4, 7), item_ids=None, **dataset
):
    """A run that begins with the old one, on other items: domain 0 has lost one and moved its others, domain 1 has new ones."""
    ids = item_ids or [
        ["a4", "a0", "a9", "a2"],
        ["b0", "b1", "b2", "b3", "b4", "b5", "b6"],
    ]
    run = SmallRun(tmp_path, ranks)
    shutil.rmtree(run.dataset.folder)
    histories = draw_histories(20, items)
    run.dataset = write_dataset(
        tmp_path / "data", histories, items=items, item_ids=ids, **dataset
    )
    run.config = run.configured(f"warm_start={old.folder}", *settings)
    return run


def table_of(run, ranks):
    """The best model and every row of M, as evaluation has them."""
    trained = load_trained_model(run.folder, run.config, run.dataset, ranks)
    model = trained.model
    table = trained.table
    with torch.no_grad():
        return model, table(torch.arange(run.dataset.num_embeddings))


def begun(run):
    warm = find_warm_start(run.config, run.dataset, run.ranks)
    plan = BatchSchedule(
        run.dataset, run.config.global_batch_size, 1, run.config.seed
    )
    return warm, Trainer(run.config, run.ranks, run.dataset, plan, warm=warm)


def test_items_are_found_by_their_ids_and_bring_their_state(
    tmp_path, ranks, old
):
    run = grown(tmp_path, ranks, old)
    warm, trainer = begun(run)
    first = 4 + ROOM
    expected = np.full(run.dataset.num_embeddings, -1)
    expected[[0, 1, 3]] = [4, 0, 2]
    expected[first : first + 4] = np.arange(4) + 5 + ROOM
    assert (
        warm.source_N.tolist() == expected.tolist()
        and warm.known == 7
        and warm.old_of_D == [0, 1]
    )
    _, before = table_of(old, ranks)
    there = torch.from_numpy(np.flatnonzero(expected >= 0))
    with torch.no_grad():
        after = trainer.table(torch.arange(run.dataset.num_embeddings))
    assert torch.equal(after[there], before[torch.from_numpy(expected)[there]])
    cold = grown(tmp_path / "cold", ranks, old).trainer()
    with torch.no_grad():
        start = cold.table(torch.arange(run.dataset.num_embeddings))
    empty = np.setdiff1d(
        np.arange(len(start)), [*range(4), *range(first, first + 7)]
    )
    assert torch.equal(after[empty], start[empty])
    for row in (2, first + 4, first + 5, first + 6):
        assert not torch.equal(after[row], start[row])
    assert trainer.table.updates == 3


def test_the_dense_model_goes_on_as_it_was(tmp_path, ranks, old):
    model, _ = table_of(old, ranks)
    _, trainer = begun(grown(tmp_path, ranks, old))
    for name, value in model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    assert not trainer.engine.optimizer.state  # it begins anew


def test_the_same_dataset_needs_no_other(tmp_path, ranks, old, monkeypatch):
    run = SmallRun(tmp_path, ranks, f"warm_start={old.folder}")
    run.dataset = old.dataset
    monkeypatch.setattr("trainer.data.prepare.extend.join_old_rows", None)
    warm = find_warm_start(run.config, run.dataset, ranks)
    assert warm.source_N.tolist() == list(range(run.dataset.num_embeddings))


def test_a_new_domain_may_come(tmp_path, ranks, old):
    ids = [["c0", "c1"], ["b1", "b0"], ["a0", "a1", "a2"]]
    run = grown(tmp_path, ranks, old, items=(2, 2, 3), item_ids=ids)
    names = ["domain 2", "domain 1", "domain 0"]
    domains = [
        dataclasses.replace(domain, name=name)
        for domain, name in zip(run.dataset.domains, names, strict=True)
    ]
    run.dataset = dataclasses.replace(run.dataset, domains=tuple(domains))
    warm, trainer = begun(run)
    assert warm.old_of_D == [-1, 1, 0] and warm.known == 5
    model, _ = table_of(old, ranks)
    gates = [gate.weight for gate in trainer.model.single_gates]
    assert torch.equal(gates[1], model.single_gates[1].weight) and torch.equal(
        gates[2], model.single_gates[0].weight
    )
    torch.testing.assert_close(gates[0], (gates[1] + gates[2]) / 2)


def test_vectors_may_be_shrunk_and_the_dense_model_is_not(tmp_path, ranks, old):
    _, whole = begun(grown(tmp_path / "whole", ranks, old))
    _, shrunk = begun(grown(tmp_path / "shrunk", ranks, old, "warm_kept=0.5"))
    rows = torch.arange(5)
    with torch.no_grad():
        assert torch.equal(shrunk.table(rows), whole.table(rows) / 2)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(shrunk.model.state_dict()[name], value), name


def test_what_makes_sense_may_differ(tmp_path, ranks, old):
    settings = [
        "optimizer.learning_rate=0.5",
        "epochs=1",
        "model.dropout=0.3",
        "negatives.shared=5",
        "table.learning_rate=0.4",
    ]
    run = grown(
        tmp_path,
        ranks,
        old,
        *settings,
        "model.time_knots=9",
        "seed=7",
        "global_batch_size=3",
    )
    assert find_warm_start(run.config, run.dataset, ranks).known == 7
    begun(run)


def no_run(run, old, folder):
    return dataclasses.replace(run.config, warm_start=str(folder)), "is no run"


def unfinished(run, old, folder):
    other = old.copied(folder / "other")
    (other.folder / "best.json").unlink()
    return dataclasses.replace(
        run.config, warm_start=str(other.folder)
    ), "holds no finished model"


def another_width(run, old, folder):
    return run.configured(
        f"warm_start={old.folder}", "model.dim=16"
    ), "another kind: model.dim was 8, is 16"


def another_optimizer(run, old, folder):
    given = run.configured(f"warm_start={old.folder}", "table.optimizer=sgd")
    return given, "another kind: table.optimizer was auto, is sgd"


def another_dataset(run, old, folder):
    other = old.copied(folder / "other")
    state = next((other.folder / "checkpoints").iterdir()) / "state.json"
    state.write_text(
        json.dumps(json.loads(state.read_text()) | {"dataset": "0" * 64})
    )
    seal(state.parent)
    return dataclasses.replace(
        run.config, warm_start=str(other.folder)
    ), "has other contents by now"


def no_dataset(run, old, folder):
    other = old.copied(folder / "other")
    config = other.folder / "config.yaml"
    config.write_text(
        config.read_text().replace(
            str(old.dataset.folder), str(folder / "gone")
        )
    )
    return dataclasses.replace(
        run.config, warm_start=str(other.folder)
    ), "rows were is not known: .*gone"


BAD = [
    no_run,
    unfinished,
    another_width,
    another_optimizer,
    another_dataset,
    no_dataset,
]


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__ for spoil in BAD])
def test_what_cannot_be_begun_with_is_named(tmp_path, ranks, old, spoil):
    run = grown(tmp_path / "run", ranks, old)
    config, message = spoil(run, old, tmp_path)
    with pytest.raises(InputError, match=message):
        find_warm_start(config, run.dataset, ranks)


def test_other_domains_altogether_are_refused(tmp_path, ranks, old):
    run = grown(tmp_path, ranks, old)
    domains = [
        dataclasses.replace(domain, name=f"other {domain.name}")
        for domain in run.dataset.domains
    ]
    with pytest.raises(
        InputError,
        match="knows none of the domains other domain 0, other domain 1",
    ):
        find_warm_start(
            run.config,
            dataclasses.replace(run.dataset, domains=tuple(domains)),
            ranks,
        )
    assert Dataset.load(run.dataset.folder)
