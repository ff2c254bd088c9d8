"""What only a CUDA device can show. Skipped without one, as on the machines that this was written on: never run yet.

python -m pytest tests/unit/test_cuda.py
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from embeddings.checkpoint import ShardCopy, load_shard
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from syncrec.batch.attention_layout import build_attention_layout
from syncrec.batch.views import move
from syncrec.layers import varlen
from syncrec.layers.attention import causal_attention
from tests.helpers.alone import deepspeed_on
from tests.helpers.ranking_cases import CASES, brute_force
from tests.helpers.ranking_worker import ranked, table_of
from tests.helpers.runs import SmallRun, everything, rank_of_one
from trainer.data.loading.stream import TrainBatches
from trainer.distributed.process_group import Ranks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"
)


@pytest.fixture(scope="module")
def ranks():
    with rank_of_one(), deepspeed_on("cuda"):
        dist.destroy_process_group()
        torch.cuda.set_device(0)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1
        )
        yield Ranks(0, 1, 0, torch.device("cuda", 0))


@pytest.mark.parametrize("heads", [1, 4])
def test_variable_length_attention_is_what_the_buckets_compute(heads):
    """In bf16, whose rounding is 2⁻⁸; gradients too."""
    lengths_S = np.random.default_rng(1).integers(0, 129, 64)
    layout = move(build_attention_layout(lengths_S), "cuda")
    assert varlen.available(torch.device("cuda"), torch.bfloat16, 128 // heads)
    generator = torch.Generator("cuda").manual_seed(1)
    qkv = torch.randn(
        3, int(lengths_S.sum()), 384, device="cuda", generator=generator
    ).bfloat16()
    found = []
    for attend in (
        lambda x: causal_attention(x, layout, heads),
        lambda x: varlen.attend(x, layout, heads),
    ):
        leaf = qkv.clone().requires_grad_()
        output = attend(leaf)
        output.float().square().sum().backward()
        found.append((output.float(), leaf.grad.float()))
    for by_buckets, by_offsets in zip(*found, strict=True):
        assert (by_buckets - by_offsets).norm() < 0.01 * by_buckets.norm()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_cached_table_is_one_on_the_device_and_its_checkpoint_too(
    ranks, tmp_path, optimizer
):
    """A cache of a tenth of the rows, so that they come and go. Training after loading tells whether the cache was emptied."""
    kinds = [
        TableConfig(optimizer=optimizer, placement=placement, cache_share=0.1)
        for placement in ("device", "cached")
    ]
    tables = [
        ItemTable(10_000, 64, config, 0, ranks.device) for config in kinds
    ]
    assert [table.capacity.cached for table in tables] == [False, True]

    def step(table, number):
        generator = torch.Generator("cuda").manual_seed(number)
        ids = torch.randint(10_000, (900,), device="cuda", generator=generator)
        rows = table(ids)
        table.update(
            torch.randn(rows.shape, device="cuda", generator=generator)
        )

    def close(one, other):
        for name, tensor in one.shard()[1].items():
            torch.testing.assert_close(
                tensor.cpu(), other.shard()[1][name].cpu(), rtol=1e-6, atol=1e-7
            )

    for number in range(20):
        for table in tables:
            step(table, number)
    close(*tables)
    ShardCopy(tables[1]).write(tmp_path)
    for table in tables:
        step(table, 20)
        load_shard(table, tmp_path)
        step(table, 21)
    close(*tables)


@pytest.mark.parametrize("placement", ["device", "cached"])
@pytest.mark.parametrize("dim", [8, 64, 128, 1024])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_table_on_the_device_is_one_on_the_cpu(
    ranks, optimizer, dim, placement
):
    """A row a thousand times in a look-up, and rows of many widths, take other kernels."""
    rows = 20_000
    tables = []
    for kind, device in ((placement, ranks.device), ("auto", "cpu")):
        config = TableConfig(optimizer=optimizer, placement=kind)
        tables.append(ItemTable(rows, dim, config, 0, device))
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        some = torch.randint(rows, (3000,), generator=generator)
        ids = torch.cat([some, torch.full((1000,), rows - 1)])
        gradient = 0.01 * torch.randn(len(ids), dim, generator=generator)
        for table in tables:
            vectors = table(ids.to(table.device))
            table.update(gradient.to(vectors.device))
    last = [table(torch.arange(rows).to(table.device)) for table in tables]
    on_device, on_cpu = (vectors.detach().cpu() for vectors in last)
    # Of the row that is asked for so often, gradients are added in another order.
    torch.testing.assert_close(on_device, on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_waits_for_nothing_and_looking_ahead_changes_nothing(
    ranks, tmp_path, stage
):
    """CUDA raises where the host waits for the stream of the step; `prepare` and `send` have one of their own to wait for."""
    run = SmallRun(
        tmp_path,
        ranks,
        f"optimizer.zero_stage={stage}",
        "model.precision=bf16",
        "model.dropout=0",
    )
    plain, ahead = run.trainer(), run.trainer()
    config = run.config
    given = (
        config.model.max_length,
        config.model.mutual_information_pooling,
        config.negatives,
        config.stream,
    )
    stream = iter(TrainBatches(plain.plan, 0, 0, *given))
    batches = [next(stream).batch.pin_memory() for _ in range(6)]
    for batch in batches:
        plain.train_step(batch)
    send, prepare = ahead._prefetcher.send, ahead._prefetcher.prepare

    def allowed(function):
        def call(*arguments):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return call

    ready = ahead.prepare(batches[0])
    try:
        for number, following in enumerate([*batches[1:], None]):
            following = None if following is None else ahead.prepare(following)
            if number == 2:  # what is made once is made
                ahead._prefetcher.send, ahead._prefetcher.prepare = (
                    allowed(send),
                    allowed(prepare),
                )
                torch.cuda.set_sync_debug_mode("error")
            ahead.train_step(ready, following)
            ready = following
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain.settle()
    ahead.settle()
    found, expected = (
        everything(ahead),
        everything(plain),
    )  # sums by atomic additions differ from time to time
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("placement", ["device", "cached"])
@pytest.mark.parametrize("name", CASES)
def test_exact_ranking_is_a_brute_force_on_the_device_too(
    ranks, name, placement
):
    """Where TF32 is allowed: ranking does not take it."""
    torch.set_float32_matmul_precision("high")
    try:
        found = ranked(
            CASES[name],
            table_of(
                CASES[name].m_NR, ranks.device, TableConfig(placement=placement)
            ),
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    for what, expected in brute_force(CASES[name]).items():
        np.testing.assert_array_equal(
            found[what], expected, f"{what} of {name}"
        )
