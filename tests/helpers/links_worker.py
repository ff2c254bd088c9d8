"""Started on two hosts by test_two_hosts.py: what a table's steps send inside the hosts and between them.

python links_worker.py OUTPUT ROWS DIM IDS EXPONENT

Four ranks, two a host. Each looks IDS distinct rows up, drawn by Zipf's law, and updates them, with one copy of the table
on all ranks and with one on each host. The first rank of each host writes OUTPUT/<group size>-<rank>.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.traffic import passed
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script

STEPS = 10


@dataclass
class Draw:
    """Rows of a step, the same whatever the sharding."""

    rows: int
    ids: int
    exponent: float

    def ids_of(self, step, rank):
        """Distinct rows of a rank in a step."""
        random = np.random.default_rng([step, rank])
        weights = np.arange(1, self.rows + 1) ** -self.exponent
        keys = random.exponential(size=self.rows) / weights
        return torch.from_numpy(np.argsort(keys)[: self.ids])


def steps(table, draw):
    """Makes the steps, with gradients that depend on the rows alone."""
    rank = dist.get_rank()
    for step in range(STEPS):
        vectors = table(draw.ids_of(step, rank))
        table.update(vectors.detach())


def main():
    """Both shardings, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("rows", type=int)
    parser.add_argument("dim", type=int)
    parser.add_argument("ids", type=int)
    parser.add_argument("exponent", type=float)
    options = parser.parse_args()
    draw = Draw(options.rows, options.ids, options.exponent)
    with process_group.join_process_group(timeout_minutes=2) as ranks:
        for size in (0, 2):
            config = TableConfig(group_size=size)
            table = ItemTable(draw.rows, options.dim, config, 0, ranks.device)
            steps(table, draw)
            dist.barrier()
            before = sent()
            steps(table, draw)
            dist.barrier()
            after = sent()
            first, tensors = table.shard()
            file = f"{size}-{ranks.rank}"
            np.savez(options.output / file, first=first, **tensors)
            if ranks.local_rank == 0:
                by_link = {}
                for link in before:
                    by_link[link] = (after[link] - before[link]) / STEPS
                text = json.dumps(by_link)
                (options.output / f"{file}.json").write_text(text)


def sent():
    """Bytes that have left this host's ranks so far, by link: to each other and to the other host."""
    cable = next(
        line.split(":")[0].strip()
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("veth")
    )
    return {"inside": passed("lo"), "between": passed(cable)}


if __name__ == "__main__":
    run_script(main)
