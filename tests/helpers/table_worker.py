"""Started with real ranks by test_table.py: look-ups, updates, save and load of one table; rank 0 writes what came out.

torchrun --nproc-per-node N worker.py OUTPUT [FOLDER with table files …]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from embeddings import table as table_module
from embeddings.checkpoint import ShardCopy, load_shard
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script

ROWS, DIM, SEED = (
    9001,
    8,
    5,
)  # three blocks of initial rows; no number of ranks divides it
RATES = (0.05, 0.05, 0.2)
COARSE = {2: ("fp16", "bf16", "int8"), 4: ("bf16",)}  # by number of ranks
CONFIG = TableConfig(learning_rate=RATES[0], eps=1e-4)
# Four ranks have two copies of the table.
GROUP_SIZES = {4: 2}


def config():
    """The settings at this number of ranks."""
    return replace(CONFIG, group_size=GROUP_SIZES.get(dist.get_world_size(), 0))


def step(number):
    """The ids of a step over all ranks, duplicates among them, and a gradient for each."""
    random = np.random.default_rng(number)
    ids = np.concatenate(
        [
            random.integers(0, ROWS, 150),
            random.integers(0, 20, 50),
            [ROWS - 1, 0],
        ]
    )
    return ids, random.normal(size=(len(ids), DIM)).astype(np.float32)


def share(number, ids, rank, ranks):
    """Which of a step's ids a rank looks up: dealt in turn; all on the first rank; one on each other rank."""
    place = np.arange(len(ids))
    owner = [
        place % ranks,
        np.zeros_like(place),
        np.where(place < ranks, place, 0),
    ][number % 3]
    return owner == rank


def everything(table, rank):
    """The whole table in the dataset's order, looked up by the last rank; the others ask for nothing."""
    ids = torch.arange(ROWS if rank == dist.get_world_size() - 1 else 0)
    with torch.no_grad():
        found = table(ids)
    assert (
        found.shape == (len(ids), DIM)
        and found.dtype == torch.float32
        and not found.requires_grad
    )
    whole = [torch.zeros(ROWS, DIM) for _ in range(dist.get_world_size())]
    dist.all_gather(whole, found if len(found) else torch.zeros(ROWS, DIM))
    return whole[-1].numpy()


def state(table):
    """What the fused optimizer keeps of each stored row, of all ranks in order, and how often it has stepped."""
    first, tensors = table.shard()
    assert tensors.keys() == {"weight", "momentum1"} and tensors[
        "weight"
    ].shape == (
        len(tensors["momentum1"]),
        DIM,
    )
    whole = torch.zeros(ROWS)
    whole[first : first + len(tensors["momentum1"])] = tensors["momentum1"]
    dist.all_reduce(whole)
    return {"momentum1": whole.numpy(), "updates": table.updates}


def main(output, *saved):
    """All of it, in a process group that is there."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    table = ItemTable(ROWS, DIM, config(), SEED, "cpu")
    results["start"] = everything(table, rank)
    results["other_seed"] = everything(
        ItemTable(ROWS, DIM, config(), SEED + 1, "cpu"), rank
    )
    for number, rate in enumerate(RATES):
        looked_up, ids = make_step(table, number, rate)
        np.testing.assert_array_equal(
            looked_up, everything_before(results, number)[ids]
        )
        results[f"after_{number}"] = everything(table, rank)
    looked_up_ahead(results, rank)
    results |= bags_of_a_look_up()
    if ranks not in GROUP_SIZES:
        in_one_bag()
    results |= {
        f"{precision}_{name}": value
        for precision in COARSE.get(ranks, ())
        for name, value in coarse(precision, rank).items()
    }
    if ranks == 3:  # two rows each: the last rank would have none
        with pytest.raises(
            ValueError,
            match="a table of 4 rows leaves some of 3 ranks without one",
        ):
            ItemTable(4, DIM, CONFIG, SEED, "cpu")
        with pytest.raises(
            ValueError, match=r"table\.group_size=2: 3 ranks cannot be cut"
        ):
            ItemTable(ROWS, DIM, replace(CONFIG, group_size=2), SEED, "cpu")
    if ranks == 4:  # the second shard would have one row for two copies
        with pytest.raises(
            ValueError,
            match="a table of 3 rows leaves some of 4 ranks without one",
        ):
            ItemTable(3, DIM, config(), SEED, "cpu")
        copies_are_equal(table)
    ItemTable(5, DIM, config(), SEED, "cpu")
    folder = output / f"saved-{ranks}"
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    copy = ShardCopy(table)
    results |= {f"state_{name}": value for name, value in state(table).items()}
    make_step(table, len(RATES), RATES[-1])  # while it is written
    results["next"] = everything(table, rank)
    assert copy.write(folder) == f"table-{rank:05d}-of-{ranks:05d}.safetensors"
    dist.barrier()
    for other in (folder, *saved):
        loaded = ItemTable(ROWS, DIM, config(), SEED + 2, "cpu")
        load_shard(loaded, other)
        results |= {
            f"state_{name}_from_{other.name}": value
            for name, value in state(loaded).items()
        }
        results[f"from_{other.name}"] = everything(loaded, rank)
        make_step(loaded, len(RATES), RATES[-1])
        results[f"next_from_{other.name}"] = everything(loaded, rank)
    if rank == 0:
        np.savez(output / f"ranks-{ranks}.npz", **results)
    dist.barrier()


def copies_are_equal(table):
    """To the bit: each rank holds what the rank as far in the other group does, and answers for another part of it."""
    first, tensors = table.local_rows()
    part, _ = table.shard()
    for tensor in (torch.tensor([first]), *tensors.values()):
        held = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(held, tensor, group=table.groups.replicas)
        assert torch.equal(*held)
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
    dist.all_gather(parts, torch.tensor([part]))
    assert len(set(map(int, parts))) == 4


def looked_up_ahead(results, rank):
    """The same steps with the next step's ids on their way before this one's update: equal to the bit."""
    table, ranks = (
        ItemTable(ROWS, DIM, config(), SEED, "cpu"),
        dist.get_world_size(),
    )
    exchange = None
    for number, rate in enumerate(RATES):
        ids, _ = step(number + 1)
        following = table.exchange(
            torch.from_numpy(ids[share(number + 1, ids, rank, ranks)])
        )
        if number == 1:
            following.send()
        make_step(table, number, rate, exchange)
        np.testing.assert_array_equal(
            everything(table, rank), results[f"after_{number}"]
        )
        exchange = following


def bags_of_a_look_up():
    """Into how many bags this rank cuts ids (none, few, many) before they are sent, and how many come to its kernel."""
    table = ItemTable(ROWS, DIM, config(), SEED, "cpu")
    received = []

    def note(module, arguments, named):
        received.append(len(named["offsets"]) - 1)

    table._kernel.register_forward_pre_hook(note, with_kwargs=True)
    sent = []
    for count in (0, 5, ROWS):
        exchange = table.exchange(torch.arange(count))
        sent.append(
            len(
                exchange._context.sharding_contexts[
                    0
                ].features_before_input_dist.lengths()
            )
        )
        table.look_up(exchange)
    return {"bags_sent": np.array(sent), "bags_received": np.array(received)}


def in_one_bag():
    """The same steps with all ids of a rank in one bag: look-ups, weights and states are equal to the bit."""
    several = ItemTable(ROWS, DIM, config(), SEED, "cpu")
    one = ItemTable(ROWS, DIM, config(), SEED, "cpu")
    for number, rate in enumerate(RATES):
        looked_up, _ = make_step(several, number, rate)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table_module, "count_bags", lambda ranks: 1)
            looked_up_in_one, _ = make_step(one, number, rate)
        np.testing.assert_array_equal(looked_up, looked_up_in_one)
        for name, tensor in one.shard()[1].items():
            np.testing.assert_array_equal(several.shard()[1][name], tensor)


def coarse(precision, rank):
    """What comes of the steps where rows and gradients travel in a coarser format: rows as stored, and as looked up."""
    table = ItemTable(
        ROWS, DIM, replace(config(), communication=precision), SEED, "cpu"
    )
    for number, rate in enumerate(RATES):
        make_step(table, number, rate, scale=1e-8 if number == 1 else 1.0)
    first, tensors = table.shard()
    whole = torch.zeros(ROWS, DIM)
    whole[first : first + len(tensors["weight"])] = tensors["weight"]
    dist.all_reduce(whole)
    stored = table.scatter.stored(torch.arange(ROWS))
    return {
        "stored": whole[stored].numpy(),
        "looked_up": everything(table, rank),
        "momentum1": state(table)["momentum1"],
    }


def make_step(table, number, rate, exchange=None, scale=1.0):
    """This rank's part of a step; the vectors that it looked up before, and their rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids, gradient = step(number)
    gradient = (scale * gradient).astype(np.float32)
    own = share(number, ids, rank, ranks)
    table.set_learning_rate(rate)
    vectors = (
        table(torch.from_numpy(ids[own]))
        if exchange is None
        else table.look_up(exchange)
    )
    assert vectors.requires_grad
    before = vectors.detach().clone()
    # The loss of a rank carries the number of ranks, so that its mean over ranks is the global one.
    vectors.backward(ranks * torch.from_numpy(gradient[own]))
    table.update(vectors.grad)
    return before.numpy(), ids[own]


def everything_before(results, number):
    """The table as it was before a step."""
    return results["start" if number == 0 else f"after_{number - 1}"]


def as_rank():
    """`main` in the process group that torchrun describes."""
    with process_group.join_process_group():
        main(*map(Path, sys.argv[1:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(as_rank)
