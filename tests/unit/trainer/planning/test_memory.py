"""What is reckoned for a rank is what table, dense model and optimizer really have."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.config import TableConfig
from embeddings.placement import Room
from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from tests.helpers.alone import group_of_one
from tests.helpers.made import draw_histories, write_dataset
from trainer.config import load_config
from trainer.planning.batch_load import measure_load
from trainer.planning.machines import DEVICES, Machines
from trainer.planning.memory import (
    bucket_bytes,
    dense_bytes,
    plan_memory,
    plan_table,
)
from trainer.planning.trial import Slice, Trial, count_weights

TRIAL = Trial(
    weights=5_000,
    half=Slice(tokens=100, bytes=1_000, operations=10, seconds=0.1),
    whole=Slice(tokens=200, bytes=1_500, operations=20, seconds=0.2),
    evaluation=700,
)
SETTINGS = [
    "global_batch_size=8",
    "model.dim=8",
    "model.ffn_dim=8",
    "model.max_length=8",
    "model.experts=3",
    "model.cross_experts=2",
    "model.time_knots=6",
    "negatives.shared=4",
    "stream.workers=1",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Forty users in eight streams."""
    return write_dataset(
        tmp_path_factory.mktemp("plan") / "data",
        draw_histories(40),
        cuts=(5, 10, 15, 20, 25, 30, 35),
        streams=8,
    )


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "sgd"])
def test_the_table_takes_what_the_real_one_has(dataset, optimizer):
    config = load_config([], [*SETTINGS, f"table.optimizer={optimizer}"])
    with group_of_one():
        table = ItemTable(
            dataset.num_embeddings,
            config.model.dim,
            TableConfig(optimizer=optimizer),
            0,
            "cpu",
        )
        _, tensors = table.shard()
        real = sum(tensor.nbytes for tensor in tensors.values())
    assert plan_table(config, dataset, 1, Room(None, 10**12)).host == real
    # Two ranks: rows are rounded up.
    rows = -(-dataset.num_embeddings // 2)
    planned = plan_table(config, dataset, 2, Room(None, 10**12)).host
    assert planned == real // dataset.num_embeddings * rows


@pytest.mark.parametrize("encoder", ["transformer", "gru"])
def test_dense_weights_are_counted_without_a_model(encoder):
    config = load_config([], [*SETTINGS, f"model.encoder={encoder}"])
    model = SyNCRec(config.model, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert count_weights(config, 2) == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = sum(p.nbytes + p.grad.nbytes for p in trained)
    for state in optimizer.state.values():
        real += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    assert dense_bytes(count_weights(config, 2), 0, 1) == real


@given(
    weights=st.integers(1, 10**9),
    ranks=st.integers(2, 512),
    stage=st.integers(1, 3),
)
def test_a_zero_stage_takes_less_the_more_ranks(weights, ranks, stage):
    few = dense_bytes(weights, stage, ranks)
    assert dense_bytes(weights, stage, 2 * ranks) < few
    assert few >= 2 * 4 * weights
    assert dense_bytes(weights, 0, ranks) == dense_bytes(weights, 0, 2 * ranks)


def test_the_bucket_is_whole_on_a_device_alone():
    config = load_config([], ["optimizer.zero_stage=2"])
    assert bucket_bytes(config, 1_000, on_device=True) == 2e9
    assert bucket_bytes(config, 1_000, on_device=False) == 4_000
    small = ["deepspeed.zero_optimization.reduce_bucket_size=500"]
    config = load_config([], ["optimizer.zero_stage=2", *small])
    assert bucket_bytes(config, 1_000, on_device=True) == 2_000
    assert bucket_bytes(load_config([], []), 1_000, on_device=True) == 0


def test_ranks_share_the_table_and_each_has_its_batch(dataset):
    config = load_config([], SETTINGS)
    load = measure_load(config, dataset, 1)
    sizes = []
    for ranks in (1, 2, 4):
        machines = Machines(ranks)
        memory = plan_memory(config, dataset, machines, load, TRIAL, 10**6)
        by_name = {part.name: part.host for part in memory.parts}
        sizes.append(by_name["item table, its optimizer"])
        assert by_name["the process itself"] == 10**6
        steps = by_name["a step: activations, gradients"]
        assert steps == pytest.approx(1.08 * TRIAL.bytes(load.most_tokens))
        assert memory.device == 0
        assert memory.process < memory.host
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_table_that_fits_no_device_is_refused_with_the_arithmetic(dataset):
    config = load_config([], [*SETTINGS, "table.placement=device"])
    load = measure_load(config, dataset, 1)
    tiny = replace(DEVICES["H100"], memory=1.0e9 + 100_000)
    memory = plan_memory(
        config, dataset, Machines(1, 1, tiny), load, TRIAL, 10**6
    )
    assert memory.refusal == ""
    tiny = replace(tiny, memory=1.0e9 + 80_500)
    memory = plan_memory(
        config, dataset, Machines(1, 1, tiny), load, TRIAL, 10**6
    )
    assert "rows a rank of 8 floats" in memory.refusal


@given(tokens=st.floats(0, 1e6), more=st.floats(0, 1e6))
def test_more_tokens_take_no_less(tokens, more):
    for function in (TRIAL.bytes, TRIAL.operations, TRIAL.seconds):
        assert function(tokens + more) >= function(tokens) >= 0


def test_between_the_slices_it_is_a_straight_line():
    assert TRIAL.bytes(100) == 1_000
    assert TRIAL.bytes(200) == 1_500
    assert TRIAL.bytes(1_000) == 5_500
    # A slice that took more than one twice as large is noise: never less than in proportion.
    noisy = replace(TRIAL, half=replace(TRIAL.half, seconds=0.3))
    assert noisy.seconds(400) == 0.2
