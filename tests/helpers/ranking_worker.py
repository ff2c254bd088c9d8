"""Started with real ranks by test_ranking.py: ranks what `cases` describe; the first rank writes what all of them got.

torchrun --nproc-per-node N -m tests.helpers.ranking_worker OUTPUT
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from embeddings.config import TableConfig
from embeddings.table import ItemTable
from embeddings.topk import cpu_scan
from embeddings.topk.ranking import ExactRanking, Excluded
from tests.helpers.ranking_cases import CASES
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script

WAYS = (
    "scan",
    "plain",
)  # the compiled kernel, where this machine has it, and PyTorch's operations


@contextlib.contextmanager
def by(way):
    """Ranks one way."""
    before = cpu_scan.supports
    try:
        if way == "plain":
            cpu_scan.supports = lambda y_UR: False
        yield
    finally:
        cpu_scan.supports = before


def table_of(m_NR, device="cpu", config=None):
    """An ItemTable with these vectors as its rows of M."""
    if config is None:
        # Four ranks have two copies, of which each rank scores a part.
        size = 2 if dist.get_world_size() == 4 else 0
        config = TableConfig(group_size=size)
    table = ItemTable(len(m_NR), m_NR.shape[1], config, 0, device)
    with table.rewritten() as (first, tensors):
        weight = tensors["weight"]
        rows = table.scatter.row(torch.arange(first, first + len(weight)))
        weight.copy_(torch.from_numpy(m_NR)[rows].to(weight.device))
    return table


def ranked(case, table):
    """{"rows", "scores", "ranks"} of all users of a case, each asked for by the rank that has it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    owner_B = case.owner(ranks)
    own = owner_B == rank
    ranking = ExactRanking(
        table,
        case.first,
        case.items,
        case.block,
        case.users,
        case.ranked_N,
    )
    y_BR, row_B = (
        torch.from_numpy(case.y_BR[own]),
        torch.from_numpy(case.row_B[own]),
    )
    excluded = None
    if case.excluded is not None:
        rows = [
            torch.tensor(case.excluded[user], dtype=torch.int64)
            for user in np.flatnonzero(own)
        ]
        counts = torch.tensor(
            [len(of_user) for of_user in rows], dtype=torch.int64
        )
        excluded = Excluded(
            torch.cat([torch.zeros(0, dtype=torch.int64), *rows]), counts
        )
    top = ranking.top_k(y_BR, case.k, excluded)
    assert (
        top.rows_Bk.dtype == torch.int64
        and top.scores_Bk.dtype == torch.float32
    )
    found = {
        "rows": top.rows_Bk,
        "scores": top.scores_Bk,
        "ranks": ranking.positions(y_BR, row_B, excluded),
    }
    for name, values in found.items():
        values = values.cpu()
        whole = torch.zeros(len(own), *values.shape[1:], dtype=torch.float64)
        whole[torch.from_numpy(own)] = torch.where(
            values == -torch.inf, -1e300, values.double()
        )
        dist.all_reduce(whole)
        whole = torch.where(whole == -1e300, -torch.inf, whole)
        found[name] = whole.to(values.dtype).numpy()
    return found


def main(output):
    """All cases, in a process group that is there."""
    results = {}
    for name, case in CASES.items():
        table = table_of(case.m_NR)
        for way in WAYS:
            with by(way):
                results |= {
                    f"{way}_{name}_{what}": values
                    for what, values in ranked(case, table).items()
                }
    if dist.get_rank() == 0:
        np.savez(output / f"ranks-{dist.get_world_size()}.npz", **results)
    dist.barrier()


def as_rank():
    """`main` in the process group that torchrun describes."""
    with process_group.join_process_group():
        main(Path(sys.argv[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(as_rank)
