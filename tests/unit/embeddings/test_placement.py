"""Where a table's rows are planned to lie, and what is refused, on devices that this machine need not have."""

import os

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.utils import add_params_from_parameter_sharding

from embeddings import placement
from embeddings.config import TableConfig
from embeddings.placement import HostNeeds, Room, free_room, plan_capacity
from embeddings.table import ItemTable, sharding_plan
from tests.helpers.alone import group_of_one

GB = 10**9
GPU = Room(device=80 * GB, host=500 * GB)


@pytest.fixture
def group():
    with group_of_one():
        yield


def planned(
    rows=10**6,
    dim=128,
    room=GPU,
    optimizer="rowwise_adagrad",
    needs=None,
    **settings,
):
    return plan_capacity(
        TableConfig(**settings),
        optimizer,
        rows,
        dim,
        room,
        needs or HostNeeds(),
    )


STATES = {
    "sgd": 0,
    "adagrad": 128,
    "rowwise_adagrad": 1,
    "adam": 256,
    "partial_rowwise_adam": 129,
}


@pytest.mark.parametrize(("optimizer", "floats"), STATES.items())
def test_a_row_takes_its_floats_and_those_of_its_optimizer(optimizer, floats):
    found = planned(optimizer=optimizer)
    assert (found.cached, found.device, found.host) == (
        False,
        10**6 * 4 * (128 + floats),
        0,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_what_is_planned_is_what_is_allocated(group, optimizer):
    table = ItemTable(1000, 8, TableConfig(optimizer=optimizer), 0, "cpu")
    allocated = sum(
        tensor.numel() * tensor.element_size()
        for tensor in table.shard()[1].values()
    )
    assert (
        table.capacity.host,
        table.capacity.device,
        table.capacity.cached,
    ) == (
        allocated,
        0,
        False,
    )
    assert str(table.capacity) == f"{allocated / 1e3:.1f} kB a rank"


def test_auto_caches_what_is_more_than_its_share_of_the_device():
    """129 floats a row, 56 GB of 80: the last row that fits is number 108,527,131."""
    most = 56 * GB // (4 * 129)
    assert (
        not planned(most).cached
        and planned(most + 1).cached
        and planned(most, device_share=0.69).cached
    )
    assert planned(1000, placement="cached").cached
    found = planned(5 * 10**8, cache_share=0.1)
    assert (found.host, found.device) == (
        5 * 10**8 * 4 * 129,
        5 * 10**7 * (4 * 128 + 16) + 4 * 5 * 10**8,
    )
    assert (
        str(found)
        == "258.0 GB a rank in the host's memory, cached in 28.4 GB of the device's"
    )
    assert str(planned()) == "516.0 MB a rank on the device"


CPU = Room(device=None, host=500 * GB)
TRAINING = HostNeeds(checkpoints=True, loaders=10 * GB)
# 129 floats a row: rows a rank, what is free, how many bytes of it the table, and a checkpoint, take of the host.
CHECKPOINTS = {
    "a copy on the host": (10**8, CPU, 51.6, 51.6, True),
    "two tables and the loaders, just": (474_806_201, CPU, 245.0, 245.0, True),
    "and one row more": (474_806_203, CPU, 245.0, 0.067, False),
    "of rows on the device": (10**8, Room(80 * GB, 70 * GB), 0, 51.6, True),
    "of rows on the device, no room": (
        10**8,
        Room(80 * GB, 60 * GB),
        0,
        0.067,
        False,
    ),
    "of rows cached on the device": (3 * 10**8, GPU, 154.8, 154.8, True),
    "of rows cached on the device, no room": (
        3 * 10**8,
        Room(80 * GB, 200 * GB),
        154.8,
        0.067,
        False,
    ),
}


@pytest.mark.parametrize(
    ("rows", "room", "host", "checkpoint", "copied"),
    CHECKPOINTS.values(),
    ids=CHECKPOINTS,
)
def test_a_checkpoints_copy_takes_of_the_host_wherever_the_rows_lie(
    rows, room, host, checkpoint, copied
):
    """All ranks of a host have a copy at once: each has its part of what is free (Room). Without room the table itself is
    written, a piece of 67 MB at a time."""
    found = planned(rows, room=room, needs=TRAINING)
    assert (round(found.host / GB, 1), found.copied) == (host, copied)
    assert found.checkpoint / GB == pytest.approx(checkpoint, rel=0.01)
    assert ("training waits while a checkpoint is written" in str(found)) == (
        not copied
    )
    evaluated = planned(rows, room=room)
    assert (evaluated.checkpoint, evaluated.copied) == (
        0,
        True,
    ) and "waits" not in str(evaluated)


REFUSED = {
    "no device": (
        {"placement": "cached", "room": CPU},
        "table.placement=cached needs CUDA: on cpu all rows",
    ),
    "host alone": (
        {"rows": 10**9, "room": CPU},
        "1,000,000,000 rows a rank of 128 floats with rowwise_adagrad's state are 516.0 GB; the host has 500.0 GB left",
    ),
    "device": (
        {"rows": 10**9, "placement": "device"},
        "are 516.0 GB; table.device_share 0.7 of the 80.0 GB left on the device is 56.0 GB: use table.placement=cached",
    ),
    "neither": (
        {"rows": 10**9},
        "is 56.0 GB, and the host has 500.0 GB left for a rank: use more ranks or hosts",
    ),
    "loaders": (
        {"rows": 950_000_000, "room": CPU, "needs": TRAINING},
        "are 490.2 GB; the host has 500.0 GB left for a rank, of which loaders take 10.0 GB: use more hosts",
    ),
    "a piece": (
        {"rows": 949_600_000, "room": CPU, "needs": TRAINING},
        "takes 67.1 MB of the host at least beside rows of 490.0 GB; the host has 500.0 GB left for a rank, of which loaders "
        "take 10.0 GB: use more hosts",
    ),
    "cache": (
        {"rows": 9 * 10**8, "cache_share": 0.5},
        "a cache of table.cache_share 0.5 of 900,000,000 rows of 128 floats takes 241.2 GB; .* is 56.0 GB: lower table.cache",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_fits_nowhere_is_refused_with_the_arithmetic(given, message):
    with pytest.raises(ValueError, match=message) as error:
        planned(**given)
    assert "\n" not in str(error.value)


def test_a_table_is_refused_before_it_is_allocated(group, monkeypatch):
    monkeypatch.setattr(placement, "available_host_memory", lambda: 10**6)
    with pytest.raises(
        ValueError, match=r"the host has 1\.0 MB left for a rank"
    ):
        ItemTable(10**9, 128, TableConfig(), 0, "cpu")


def test_ranks_of_a_host_share_its_memory(group, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(placement, "available_host_memory", lambda: 80 * GB)
    for local, expected in (("4", 20 * GB), ("8", 10 * GB), (None, 5 * GB)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert free_room(torch.device("cpu")) == Room(None, expected)


def test_the_hosts_free_memory_is_between_nothing_and_all_of_it():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**7 < placement.available_host_memory() < 2 * total


@pytest.mark.parametrize("cache_share", [None, 0.25])
def test_the_plan_has_equal_ranges_on_each_hosts_devices_and_the_caches_share(
    cache_share,
):
    """Two hosts of two GPUs: the third rank's rows are on its host's first."""
    tables = [
        EmbeddingConfig(
            name="item_table",
            embedding_dim=8,
            num_embeddings=10,
            feature_names=["item"],
        )
    ]
    collection = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    sharder = EmbeddingCollectionSharder()
    found = sharding_plan(
        collection,
        sharder,
        cache_share,
        ranks=4,
        local_size=2,
        device_type="cuda",
    )["item_table"]
    assert found.sharding_type == "row_wise" and found.ranks == [0, 1, 2, 3]
    shards = found.sharding_spec.shards
    assert [shard.shard_sizes for shard in shards] == [
        [3, 8],
        [3, 8],
        [3, 8],
        [1, 8],
    ]
    assert [str(shard.placement) for shard in shards] == [
        f"rank:{rank}/cuda:{rank % 2}" for rank in range(4)
    ]
    assert found.compute_kernel == (
        "fused" if cache_share is None else "fused_uvm_caching"
    )
    # What reaches FBGEMM beside the optimizer's own parameters.
    fbgemm = add_params_from_parameter_sharding({}, found)
    assert fbgemm == (
        {} if cache_share is None else {"cache_load_factor": cache_share}
    )


def test_rows_that_are_written_are_not_shadowed_by_the_cache(
    group, monkeypatch
):
    """FBGEMM has a cache on CUDA alone: that it is emptied after each writing is what can be seen here."""
    table = ItemTable(10, 4, TableConfig(), 0, "cpu")
    done = []
    monkeypatch.setattr(table._kernel, "flush", lambda: done.append("flush"))
    monkeypatch.setattr(
        table._kernel, "reset_cache_states", lambda: done.append("reset")
    )
    with table.rewritten() as (_, tensors):
        tensors["weight"].fill_(7)
        done.append("written")
    assert done == ["flush", "written", "reset"]
    assert (table(torch.tensor([3])) == 7).all()


@pytest.mark.parametrize(
    ("kind", "visible", "devices"),
    [("cpu", 0, 4), ("cuda", 4, 4), ("cuda", 8, 4), ("cuda", 1, 1)],
)
def test_torchrec_counts_the_devices_that_a_rank_sees(
    group, monkeypatch, kind, visible, devices
):
    """A rank that sees one device has number 0, whichever of its host's ranks it is."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert placement.count_devices_of_host(torch.device(kind)) == devices
