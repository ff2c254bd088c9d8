"""A table on disk into a table of other rows, at any number of ranks: what is left of it, and what is new.

Shapes: N rows of the table, G groups, r width.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from embeddings.rows import RowScatter
from embeddings.storage import table_paths

_BLOCK = 1 << 18  # rows of a file that are held at once


def carry_rows(table, folder: Path, source_N, group_N, init_std, kept=1.0, names=None):
    """Fills this rank's rows from the files of any number of ranks in `folder`. Called on all ranks, of a table that has just
    been made.

    source_N: which row of the table on disk each row was, −1: none; it gets the vector and the optimizer's state. group_N: to
    which group each row belongs, −1: to none, nobody has it. A row of a group that was none begins at the mean of the group's
    others with their spread, coordinate by coordinate, and without a state; where a group has no others, of all. Integers (N,).
    init_std: of the vectors that the table was made with, which are what is spread. kept: what every vector is multiplied by in
    the end; the optimizer's state, sums of squared gradients, by its square (Ash and Adams, 2020, "On Warm-Starting Neural
    Network Training": shrunk, they follow what is new as fresh ones do, and still know what they knew).
    names: of the table's files in the folder; None: all that a listing has.
    Raises ValueError where the files are of another width or optimizer, or do not hold every row that is asked for.
    """
    with table.rewritten() as (first, tensors):
        own_N = table.scatter.row(np.arange(first, first + len(tensors["weight"])))
        source_N, group_N = np.asarray(source_N, np.int64)[own_N], np.asarray(group_N, np.int64)[own_N]
        _read(table, table_paths(folder, names), tensors, source_N)
        _begin(tensors["weight"], source_N, group_N, init_std)
        if kept != 1:
            for name, tensor in tensors.items():
                tensor.mul_(kept if name == "weight" else kept**2)


def _read(table, files, tensors, source_N):
    found = 0
    for file in files:
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata() or {}
            scatter = RowScatter(int(facts["rows"]))
            if facts["scatter_step"] != str(scatter.step):
                raise ValueError(f"{file}: holds its rows in another order than this program's")
            if missing := tensors.keys() - stored.keys():
                raise ValueError(f"{file}: lacks the optimizer's {', '.join(sorted(missing))}: it is of another optimizer")
            begin, count = int(facts["first_stored_row"]), stored.get_slice("weight").get_shape()[0]
            known = np.flatnonzero(source_N >= 0)
            there_K = scatter.stored(source_N[known]) - begin
            here = (there_K >= 0) & (there_K < count)
            order = np.argsort(there_K[here], kind="stable")
            place_K, there_K = known[here][order], there_K[here][order]
            found += len(place_K)
            for name, tensor in tensors.items():
                kept = stored.get_slice(name)
                if kept.get_shape()[1:] != list(tensor.shape[1:]):
                    raise ValueError(f"{file}: {name} is {kept.get_shape()}, this table has rows of {list(tensor.shape[1:])}")
                for low in range(0, count, _BLOCK):
                    part = slice(*np.searchsorted(there_K, [low, low + _BLOCK]))
                    if part.start == part.stop:
                        continue
                    values = kept[low : min(low + _BLOCK, count)][torch.from_numpy(there_K[part] - low)]
                    tensor[torch.from_numpy(place_K[part]).to(tensor.device)] = values.to(tensor)
            table.updates = int(facts["updates"])
    if found != np.count_nonzero(source_N >= 0):
        wanted = np.count_nonzero(source_N >= 0)
        raise ValueError(f"table files hold {found} of the {wanted} rows that rank {dist.get_rank()} asks for")


def _begin(weight, source_N, group_N, init_std):
    """Gives rows that were none their first vectors."""
    width = weight.shape[1]
    groups = torch.tensor([int(group_N.max(initial=-1)) + 1])
    dist.all_reduce(groups, op=dist.ReduceOp.MAX)
    grouped = np.flatnonzero(group_N >= 0)
    carried, new = grouped[source_N[grouped] >= 0], grouped[source_N[grouped] < 0]
    sums = torch.zeros(int(groups), 1 + 2 * width, dtype=torch.float64)
    for low in range(0, len(carried), _BLOCK):
        part = carried[low : low + _BLOCK]
        vectors = weight[torch.from_numpy(part).to(weight.device)].double().cpu()
        facts = torch.cat([torch.ones(len(part), 1, dtype=torch.float64), vectors, vectors.square()], dim=1)
        sums.index_add_(0, torch.from_numpy(group_N[part]), facts)
    dist.all_reduce(sums)
    sums = torch.where(sums[:, :1] > 0, sums, sums.sum(0))
    if not sums[:, 0].all():  # nothing was carried at all
        return
    mean_GR, square_GR = (sums[:, 1:] / sums[:, :1]).split(width, dim=1)
    spread_GR = (square_GR - mean_GR.square()).clamp(min=0).sqrt()
    for low in range(0, len(new), _BLOCK):
        part = torch.from_numpy(new[low : low + _BLOCK]).to(weight.device)
        group = torch.from_numpy(group_N[new[low : low + _BLOCK]])
        drawn = weight[part].double().cpu() / init_std
        weight[part] = (mean_GR[group] + drawn * spread_GR[group]).to(weight)
