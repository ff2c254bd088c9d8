"""Started with real ranks by test_carry.py: saves a table that has been updated, and carries saved ones into another.

torchrun --nproc-per-node N -m tests.helpers.carry_worker save|carry OUTPUT [FOLDER with table files …]
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from embeddings.checkpoint import ShardCopy
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from embeddings.warm_start import carry_rows, start_new_rows
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script

OLD, NEW, DIM = 6003, 7007, 4
CONFIG = TableConfig(
    optimizer="rowwise_adagrad", learning_rate=0.1, init_std=0.05
)
GROUP_SIZES = {4: 2}  # ranks of a copy, where they have more than one
GROUPS = (
    (0, 3000),
    (3000, 5500),
    (5500, 5700),
)  # of the new table; the last one was not there before; the rest is nobody's
FRESH = 100  # rows of each group without a source


def config():
    """The settings at this number of ranks."""
    return replace(CONFIG, group_size=GROUP_SIZES.get(dist.get_world_size(), 0))


def mapping():
    """source_N and group_N of the new table: old rows in another order, some of them gone."""
    random, group_N, source_N = (
        np.random.default_rng(3),
        np.full(NEW, -1),
        np.full(NEW, -1),
    )
    left = random.permutation(OLD)
    for number, (first, last) in enumerate(GROUPS):
        group_N[first:last] = number
        if number < 2:
            rows = random.permutation(np.arange(first, last))[FRESH:]
            source_N[rows], left = left[: len(rows)], left[len(rows) :]
    return source_N, group_N


def contents(table):
    """The table and its optimizer's state in the order of rows, of all ranks: {name: array}."""
    first, tensors = table.shard()
    found = {}
    for name, tensor in tensors.items():
        whole = torch.zeros(table.rows, *tensor.shape[1:])
        whole[
            torch.from_numpy(
                table.scatter.row(np.arange(first, first + len(tensor)))
            )
        ] = tensor.cpu()
        dist.all_reduce(whole)
        found[name] = whole.numpy()
    return found | {"updates": table.updates}


def save(output):
    """A table after three updates by all ranks together, its files and its contents."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    table = ItemTable(OLD, DIM, config(), 1, "cpu")
    for number in range(3):
        ids = np.random.default_rng(number).integers(0, OLD, 4000)[rank::ranks]
        table(torch.from_numpy(ids))
        table.update(
            torch.from_numpy(
                np.random.default_rng(ids)
                .normal(size=(len(ids), DIM))
                .astype(np.float32)
            )
        )
    folder = output / f"saved-{ranks}"
    folder.mkdir(exist_ok=True)
    dist.barrier()
    ShardCopy(table).write(folder)
    found = contents(table)
    if rank == 0:
        np.savez(folder / "contents.npz", **found)


def carry(output, *saved, kept=1.0):
    """Each saved table carried into a new one."""
    for folder in map(Path, saved):
        start, expected = by_hand(np.load(folder / "contents.npz"))
        table = ItemTable(NEW, DIM, config(), 2, "cpu", filled=False)
        with mock.patch("embeddings.warm_start.safe_open", Counted):
            Counted.opens = Counted.rows = 0
            carry_rows(table, folder, *mapping(), CONFIG.init_std, kept)
        read = torch.tensor([Counted.opens, Counted.rows])
        dist.all_reduce(read)
        found = contents(table) | {
            f"by_hand_{name}": values for name, values in expected.items()
        }
        if dist.get_rank() == 0:
            name = f"{folder.name}-carried-{dist.get_world_size()}.npz"
            np.savez(output / name, start=start, read=read.numpy(), **found)


def by_hand(before):
    """The vectors that all rows of the new table are drawn, and the whole table by the plain way: every row is drawn, those
    that were there are put over them, and the others begin from what was drawn."""
    table = ItemTable(NEW, DIM, config(), 2, "cpu")
    start = contents(table)["weight"]
    with table.rewritten() as (first, tensors):
        own_N = table.scatter.row(
            np.arange(first, first + len(tensors["weight"]))
        )
        source_N, group_N = (each[own_N] for each in mapping())
        there = np.flatnonzero(source_N >= 0)
        for name, tensor in tensors.items():
            tensor[torch.from_numpy(there)] = torch.from_numpy(
                before[name][source_N[there]]
            )
        start_new_rows(tensors["weight"], source_N, group_N, CONFIG.init_std)
    return start, contents(table)


class Counted:
    """safe_open that counts files and rows."""

    opens = rows = 0

    def __init__(self, file, framework):
        Counted.opens += 1
        self._file = safe_open(file, framework=framework)

    def __enter__(self):
        self._open = self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._open, name)

    def get_slice(self, name):
        return CountedSlice(self._open.get_slice(name))


class CountedSlice:
    def __init__(self, values):
        self._values = values

    def get_shape(self):
        return self._values.get_shape()

    def __getitem__(self, part):
        found = self._values[part]
        Counted.rows += len(found)
        return found


def main():
    """With what the command line says."""
    what, output, *saved = sys.argv[1:]
    with process_group.join_process_group():
        {"save": save, "carry": carry}[what](Path(output), *saved)


if __name__ == "__main__":
    run_script(main)
