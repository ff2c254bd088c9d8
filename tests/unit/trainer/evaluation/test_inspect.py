"""A look at a trained model against its own gates and vectors."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.evaluation.inspect
from syncrec.batch.build import build_batch
from syncrec.batch.views import move
from tests.helpers.runs import SmallRun, rank_of_one, train
from trainer.data.format.vocabulary import read_item_counts, read_item_ids
from trainer.data.loading.histories import Histories
from trainer.data.split import SPLIT_LENGTH
from trainer.evaluation.inspect import InspectionConfig, inspect_model

CROSS = [
    "model.tasks=cross",
    "model.stop_gradient=off",
    "model.loss_correction=none",
    "model.mutual_information=off",
]


def looked(folder, *settings, **look):
    """(run, trainer, what a look at a model of three steps finds)."""
    with rank_of_one() as ranks:
        run = SmallRun(folder, ranks, *settings)
        trainer = run.trainer()
        train(trainer, 3)
        model = trainer.engine.module.eval()
        with torch.no_grad():
            vectors = (
                trainer.table(torch.arange(run.dataset.num_embeddings))
                .numpy()
                .copy()
            )
        found = inspect_model(
            model,
            trainer.table,
            run.dataset,
            run.config,
            ranks,
            InspectionConfig(**look),
        )
    return run, model, vectors, found


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    return looked(tmp_path_factory.mktemp("look"), users=13, neighbours=3)


@torch.no_grad()
def test_gates_are_the_means_over_the_first_users_tokens(look):
    run, model, vectors, found = look
    dataset = run.dataset
    sums = {
        view: {domain.name: [] for domain in dataset.domains}
        for view in ("cross", "single")
    }
    histories = Histories(dataset, blocks=1)
    for user in range(13):
        items = histories.read(np.array([user])).items_N
        items = items[:-2] if len(items) >= SPLIT_LENGTH else items
        domain_N = dataset.domain_of(items)
        nothing = [np.zeros(0, np.int64) for _ in dataset.domains]
        sizes = [domain.items for domain in dataset.domains]
        arrays = (
            items,
            np.array([len(items)]),
            domain_N,
            np.ones(1),
            nothing,
            sizes,
            run.config.model.max_length,
        )
        batch = move(build_batch(*arrays), "cpu")
        rows = torch.from_numpy(vectors)[batch.ids]
        x = model.embedding(batch.cross, rows)
        for token, weights in enumerate(
            model.cross_gate(x, batch.cross, slice(None))
        ):
            if place := int(batch.cross.input_M[token]):
                sums["cross"][dataset.domains[domain_N[place - 1]].name].append(
                    weights
                )
        x, edges = model.embedding(batch.single, rows), batch.single.task_starts
        for number, domain in enumerate(dataset.domains):
            task = slice(edges[number], edges[number + 1])
            sums["single"][domain.name] += list(
                model.single_gates[number](x[task], batch.single, task)
            )
    histories.close()
    for view, by_domain in sums.items():
        assert {name for name, weights in by_domain.items() if weights} == set(
            found["gates"][view]
        )
        for name, weights in found["gates"][view].items():
            np.testing.assert_allclose(
                weights, torch.stack(by_domain[name]).mean(0), atol=1e-4
            )
            assert sum(weights) == pytest.approx(1, abs=1e-3)


def test_lambda_is_the_models_in_relation_to_equal_weights(look):
    run, model, _, found = look
    assert list(found["lambda"]) == [
        domain.name for domain in run.dataset.domains
    ]
    own_D = model.correction.lambda_D
    expected = (own_D / own_D.mean()).tolist()
    assert list(found["lambda"].values()) == pytest.approx(expected)


def test_a_rank_without_users_adds_nothing(tmp_path):
    assert looked(tmp_path, users=0)[3]["gates"] == {"cross": {}, "single": {}}


def test_items_that_training_never_met_are_not_shown(tmp_path, monkeypatch):
    def counts(dataset):
        found = read_item_counts(dataset).copy()
        found[1:3] = 0  # of the first domain
        found[dataset.domains[1].start :] = 0
        return found

    monkeypatch.setattr(trainer.evaluation.inspect, "read_item_counts", counts)
    run, _, _, found = looked(tmp_path)
    first, second = run.dataset.domains
    never = set(read_item_ids(run.dataset, first).to_pylist()[1:3])
    assert {item["domain"] for item in found["items"]} == {first.name}
    for item in found["items"]:
        assert item["nearest"][second.name] == []
        near = [name for name, _ in item["nearest"][first.name]]
        assert len(near) == first.items - 3 and not never & {
            item["item"],
            *near,
        }


def test_neighbours_of_the_most_popular_items_by_cosine(look):
    run, _, vectors, found = look
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    counts = read_item_counts(run.dataset)
    ids = {}
    for domain in run.dataset.domains:
        for line in pq.read_table(
            run.dataset.local(domain.vocabulary)
        ).to_pylist():
            ids[domain.name, line["item_id"]] = line["row"]
    for domain in run.dataset.domains:
        own = [item for item in found["items"] if item["domain"] == domain.name]
        popular = sorted(
            range(domain.start, domain.start + domain.items),
            key=lambda row: -counts[row],
        )[:2]
        assert [ids[domain.name, item["item"]] for item in own] == popular
        for item, row in zip(own, popular, strict=True):
            for other in run.dataset.domains:
                rows = [
                    place
                    for place in range(other.start, other.start + other.items)
                    if place != row
                ]
                best = sorted(
                    (float(vectors[place] @ vectors[row]) for place in rows),
                    reverse=True,
                )[:3]
                near = item["nearest"][other.name]
                assert [value for _, value in near] == pytest.approx(
                    best, abs=1e-4
                )
                for name, value in near:
                    assert float(
                        vectors[ids[other.name, name]] @ vectors[row]
                    ) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "view"),
    [
        ([*CROSS, "model.experts=2"], "cross"),
        ([*CROSS, "model.experts=1", "model.tower=off"], None),
        (["model.gate=sequence"], "single"),
        (["model.encoder=gru", "model.loss_correction=shapley"], "single"),
        (
            [
                *CROSS,
                "model.experts=2",
                "model.encoder=gru",
                "model.loss_correction=shapley",
            ],
            "cross",
        ),
    ],
)
def test_what_a_model_has_not_is_left_out(tmp_path, settings, view):
    _, model, _, found = looked(tmp_path, *settings)
    gates = {
        name for name, weights in found["gates"].items() if weights is not None
    }
    assert (
        gates
        == {None: set(), "cross": {"cross"}, "single": {"cross", "single"}}[
            view
        ]
    )
    assert (found["lambda"] is None) == (model.correction is None)
    assert found["items"]
