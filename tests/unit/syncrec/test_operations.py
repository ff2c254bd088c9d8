"""The formula of a step's operations, against PyTorch's counter; padded slots.

tests/unit/benchmarks/test_train_step.py compares the default model, with the padded one beside it.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workload import dataset_of, draw
from syncrec.batch.build import build_batch
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from syncrec.operations import count_slots, packed_work, step_operations
from trainer.config.negatives import NegativesConfig

CROSS = {
    "tasks": "cross",
    "stop_gradient": False,
    "loss_correction": "none",
}


class Everything:
    """In place of the counter's module tracker, which does not take modules without a graph."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def batch_of(config, accumulation=1):
    dataset = dataset_of(1000, 3, users=8, steps=1)
    arrays = draw(
        dataset, 0, 8, 4, config.max_length, NegativesConfig(shared=300)
    )
    items = [domain.items for domain in dataset.domains]
    batch = build_batch(
        *arrays, items, config.max_length, accumulation=accumulation
    )
    return move(batch, "cpu")


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"stop_gradient": False},
        {"stop_gradient": "harm"},
        {"tower": False},
        CROSS,
        CROSS | {"encoder": "gru", "kernel": "auto"},
    ],
    ids=str,
)
def test_the_formula_counts_what_is_computed(variant):
    sizes = {
        "dim": 32,
        "max_length": 32,
        "experts": 5,
        "cross_experts": 3,
        "ffn_dim": 48,
        "kernel": "plain",
        "dropout": 0.0,
        "time_knots": 0,
    }
    config = ModelConfig(**(sizes | variant))
    batch = batch_of(config)
    model = SyNCRec(config, 3)
    vectors = torch.randn(len(batch.ids), config.dim, requires_grad=True)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Everything()
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, vectors)[0].backward()
    # A GRU computes padded slots too; the plain attention computes whole squares.
    work = packed_work(config, batch, square=True)
    if config.encoder == "gru":
        tokens, slots = count_slots(config, batch)
        computed = counter.get_total_flops()
        formula = step_operations(config, work)
        assert formula < computed < 1.1 * slots / tokens * formula
        return
    assert step_operations(config, work) == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


def test_slots_are_those_of_the_buckets():
    config = ModelConfig(dim=8, max_length=32, time_knots=0)
    batch = batch_of(config)
    tokens, slots = count_slots(config, batch)
    padded = len(batch.cross.attention.pad_P) + len(
        batch.single.attention.pad_P
    )
    assert (tokens, slots) == (
        len(batch.cross.input_M) + len(batch.single.input_M),
        padded,
    )
    cross_alone = ModelConfig(dim=8, max_length=32, time_knots=0, **CROSS)
    assert count_slots(cross_alone, batch)[1] == len(
        batch.cross.attention.pad_P
    )


def test_micro_batches_have_the_operations_and_tokens_of_their_batch():
    config = ModelConfig(dim=8, max_length=32, time_knots=0)
    whole = batch_of(config)
    cut = batch_of(config, accumulation=3)
    assert len(cut.micro_batches) == 3
    expected = step_operations(config, packed_work(config, whole))
    assert step_operations(config, packed_work(config, cut)) == expected
    assert count_slots(config, cut)[0] == count_slots(config, whole)[0]
