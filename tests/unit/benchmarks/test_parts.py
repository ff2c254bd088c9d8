"""Parts add up to the step, are what the model computes, and have the limits that their sizes give."""

import json
import sys

import pytest
import torch

from benchmarks import parts, suite
from benchmarks.workload import dataset_of, draw
from syncrec.batch.build import build_batch
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from tests.helpers.alone import as_a_script, in_this_process
from tests.helpers.reference import EQUATIONS
from trainer.config.negatives import NegativesConfig

OF_A_STEP = [
    "table look-up",
    "model forward",
    "model backward",
    "table update",
    "dense optimizer step",
    "the rest",
]
OF_THE_MODEL = [
    *(
        "experts forward",
        "experts forward and backward",
        "gates and towers, forward and backward",
    ),
    *("losses, forward and backward", "batch building"),
]
OF_RANKS = [
    *(
        "all-to-all of ids",
        "all-to-all of rows",
        "all-reduce of dense gradients",
        "sums for λ",
        "gather for SC-MIM",
    ),
    *("table look-up and exchange", "table update and exchange"),
]


@pytest.mark.slow
@pytest.mark.ranks
def test_all_parts_are_measured_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "in_own_process", in_this_process)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "result.json"
    given = [
        *(
            "precision=[fp32]",
            "items=500",
            "users=4",
            "repeats=3",
            "warmup=1",
            "window=0.001",
            "memory_bytes=4096",
        ),
        "wire_bytes=4096",
        *(
            "model.dim=16",
            "model.max_length=16",
            "model.experts=3",
            "model.cross_experts=2",
            "model.ffn_dim=16",
        ),
    ]
    monkeypatch.setattr(sys, "argv", ["parts.py", "--json", str(file), *given])
    with as_a_script():
        parts.main()
    record = json.loads(file.read_text())
    results = record["results"]
    assert [of["part"] for of in results] == [
        *OF_A_STEP,
        "step",
        *OF_THE_MODEL,
        *OF_RANKS,
    ]
    lines = {of["part"]: of for of in results}
    for repeat in range(3):
        spent = sum(lines[name]["seconds"]["all"][repeat] for name in OF_A_STEP)
        assert (
            spent == pytest.approx(lines["step"]["seconds"]["all"][repeat])
            and lines["the rest"]["seconds"]["min"] > 0
        )
    assert lines["step"]["limit_seconds"] == pytest.approx(
        sum(lines[name]["limit_seconds"] for name in OF_A_STEP[:-1])
    )
    for of in results:
        assert len(of["seconds"]["all"]) == 3
        if of["part"] != "the rest":
            assert (
                of["share"]
                == pytest.approx(of["limit_seconds"] / of["seconds"]["median"])
                and of["share"] > 0
            )
    products, memory = (
        record["limits"]["fp32"]["products"],
        record["limits"]["fp32"]["memory"],
    )
    whole = (
        lines["model forward"]["limit_seconds"]
        + lines["model backward"]["limit_seconds"]
    )
    assert whole == pytest.approx(products["seconds_per_step"])
    assert (
        lines["experts forward"]["limit_seconds"]
        < lines["experts forward and backward"]["limit_seconds"]
        < whole
    )
    # 4 users of 16 interactions, each with one negative: at most so many rows of 16 floats, read and written.
    assert (
        0.8
        < lines["table look-up"]["limit_seconds"]
        / (2 * 128 * 64 / memory["gather"])
        <= 1
    )
    assert all(of["ranks"] == 2 for of in results[-len(OF_RANKS) :])
    wire = record["limits"]["2 ranks"]["wire"]
    assert (
        0.8
        < lines["all-to-all of rows"]["limit_seconds"]
        / (128 * 64 / 2 / wire["all_to_all"])
        <= 1
    )
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in [*OF_A_STEP, *OF_THE_MODEL])
    assert all(f"| 2 ranks: {name} " in shown for name in OF_RANKS)


def test_what_is_made_again_is_what_the_model_computed():
    config = ModelConfig(
        dim=16,
        max_length=16,
        experts=3,
        cross_experts=2,
        ffn_dim=16,
        dropout=0.0,
        **EQUATIONS | {"loss_correction": "none"},
    )
    dataset = dataset_of(500, 3, users=4, steps=1)
    arrays = draw(dataset, 0, 4, 16, 16, NegativesConfig(shared=0))
    batch = move(
        build_batch(*arrays, [domain.items for domain in dataset.domains], 16),
        "cpu",
    )
    model, rows = (
        SyNCRec(config, 3),
        torch.randn(len(batch.ids), 16, requires_grad=True),
    )
    losses = []
    experts, tasks, of_losses = parts.noted(
        model, lambda: losses.append(model(batch, rows)[0])
    )
    assert [call.graph for call in experts].count(
        True
    ) == 2  # a stack learns in one of the views
    assert (
        len(experts) == 4 and len(tasks) == 2 * (1 + 1) and len(of_losses) == 1
    )
    (call,) = of_losses
    assert torch.equal(call.function(*call.arguments)[0], losses[0]) and all(
        leaf.is_leaf for leaf in call.leaves
    )
    parts.again(experts + tasks + of_losses, backward=True)
    assert all(
        weight.grad is None for weight in model.parameters()
    ) and "_losses" not in vars(model)
