"""How fast are all items of a domain ranked, as a share of what the machine multiplies, and
beside FAISS?

    python benchmarks/ranking.py                 10⁵ and 10⁶ items, r = 64 and 128
    python benchmarks/ranking.py --short         10⁵ items, one repeat
    pip install 'syncrec-trainer[index]'         FAISS; without it its lines stay empty

One process with all cores, vectors drawn from a normal distribution, and in turn, so that what
else the machine does meets all:

- top_k: `ExactRanking.top_k` (embeddings/topk/ranking.py); with exclusions: the same where each
  user has had some items.
- ranks: `ExactRanking.positions` of an item for each user.
- FAISS: `IndexFlatIP.search` over a copy of the same vectors, with as many threads.
- limit: the float32 product of the users at once with one block of items, over and over: all
  scores, and nothing kept of them.

A share is that of the limit's operations a second: 2 r for each user and item. FAISS gives what
its product gives; ours gives what float64 does, equal for any number of ranks. Memory is the
peak of a call beside what was there before, the users' vectors among it, for two numbers of
users; the answers themselves are k numbers of 12 bytes a user.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits, machine, suite
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from embeddings.topk.ranking import ExactRanking, Excluded
from trainer.distributed import process_group

try:
    import faiss
except ImportError:
    faiss = None


@dataclass(frozen=True)
class Settings:
    """settings/ranking.yaml. repeats: calls of each."""

    items: list[int]
    dim: list[int]
    users: int
    fewer_users: int
    k: int
    excluded: int
    repeats: int
    window: float

    def __post_init__(self):
        suite.at_least(
            1,
            self,
            "items",
            "dim",
            "users",
            "fewer_users",
            "k",
            "excluded",
            "repeats",
        )
        if self.fewer_users >= self.users:
            raise ValueError(
                f"fewer_users is {self.fewer_users}: give less than users, {self.users}"
            )
        if any(dim % 4 for dim in self.dim):
            raise ValueError(
                f"dim is {self.dim}: FBGEMM's rows are of multiples of 4"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("ranking", Settings)
    record = suite.header("ranking", settings, options)
    record["faiss"] = faiss.__version__ if faiss else None
    results = []
    for items in settings.items:
        for dim in settings.dim:
            begin = time.perf_counter()
            results += suite.in_own_process(measure, settings, items, dim)
            print(
                f"{items:,} items, r = {dim} ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    suite.save("ranking", record | {"results": results}, options)


def measure(settings: Settings, items: int, dim: int) -> list[dict]:
    """The lines of one table of items."""
    with process_group.join_process_group() as ranks:
        return _measure(settings, items, dim, ranks.device)


def _measure(settings, items, dim, device):
    generator = torch.Generator().manual_seed(1)
    table = ItemTable(items, dim, TableConfig(init_std=1.0), 1, device)
    y_BR = torch.randn(settings.users, dim, generator=generator).to(device)
    row_B = torch.randint(items, (settings.users,), generator=generator).to(
        device
    )
    rows_E = torch.randint(
        items, (settings.users * settings.excluded,), generator=generator
    ).to(device)
    ranking = ExactRanking(table, 0, items)
    k = settings.k
    memory = {}
    for count in (settings.fewer_users, settings.users):
        counts = torch.full((count,), settings.excluded, device=device)
        given = (
            y_BR[:count],
            row_B[:count],
            k,
            Excluded(rows_E[: count * settings.excluded], counts),
        )
        calls = calls_of(ranking, *given)
        for name, call in calls.items():
            memory.setdefault(name, []).append(peak(call, device))
    if faiss and device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(dim)
        index.add(table.shard()[1]["weight"].numpy())
        calls["FAISS"] = lambda: index.search(y_BR.numpy(), k)
    product = Counter(
        {limits.Product(1, ranking.users, dim, ranking.block, "right"): 1}
    )
    multiplied = []
    seconds = {name: [] for name in calls}
    for repeat in range(-1, settings.repeats):
        for name, call in calls.items():
            spent = timed(call, device)
            if repeat >= 0:
                seconds[name].append(spent)
        multiplied.append(
            limits.matmul(product, torch.float32, device, settings.window)
        )
    limit = limits.fastest(multiplied)
    work = 2 * dim * items * settings.users
    return [
        {
            "system": name,
            "items": items,
            "dim": dim,
            "users": settings.users,
            "seconds": suite.spread(values),
            "users_per_second": settings.users
            / (median := suite.spread(values)["median"]),
            "rate": work / median,
            "share": work / median / limit["rate"],
            "limit": limit["rate"],
            "square_rate": limit["square_rate"],
            "memory_bytes": memory.get(name),
        }
        for name, values in seconds.items()
    ]


def calls_of(
    ranking: ExactRanking,
    y_BR: torch.Tensor,
    row_B: torch.Tensor,
    k: int,
    had: Excluded,
) -> dict[str, Callable]:
    """What is measured of ours."""
    return {
        "top_k": lambda: ranking.top_k(y_BR, k),
        "top_k with exclusions": lambda: ranking.top_k(y_BR, k, had),
        "ranks": lambda: ranking.positions(y_BR, row_B),
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beside what was there; None where it cannot be told."""
    call()  # what is made once is there
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = machine.reset_peak_memory()
    call()
    return None if before is None else machine.peak_memory() - before


def table(record: dict) -> str:
    """A line for each system and table of items."""
    rows = []
    settings = record["settings"]
    for line in record["results"]:
        slowest, fastest = (
            line["users"] / line["seconds"][name] for name in ("max", "min")
        )
        memory = line["memory_bytes"]
        rows.append(
            {
                "": line["system"],
                "items": f"{line['items']:,}",
                "r": line["dim"],
                "users/s (min – max)": f"{line['users_per_second']:,.0f} ({slowest:,.0f} – "
                f"{fastest:,.0f})",
                "GFLOP/s": f"{line['rate'] / 1e9:,.0f}",
                "of the limit": f"{line['share']:.0%}",
                "limit GFLOP/s": f"{line['limit'] / 1e9:,.0f}",
                "memory MB": ""
                if not memory or None in memory
                else " / ".join(f"{size / 1e6:,.0f}" for size in memory),
            }
        )
    what = (
        f"{settings['users']:,} users a call, k = {settings['k']}, {settings['excluded']} "
        "exclusions a user where there are "
        f"any. Memory for {settings['fewer_users']:,} and {settings['users']:,} users."
    )
    missing = (
        "FAISS was not installed there: pip install 'syncrec-trainer[index]'."
    )
    peer = f"FAISS {record['faiss']}." if record["faiss"] else missing
    return "\n\n".join([what, suite.markdown(rows), peer])


if __name__ == "__main__":
    main()
