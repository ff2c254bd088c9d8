"""What do a rank's loaders open, hash and decode in an epoch? Ranks are simulated, no shard is
there.

    python benchmarks/loaders.py          64 and 512 ranks of 128 and 1,024 users, a million users
    python benchmarks/loaders.py users=12000000 ranks=[64] steps=40
    python benchmarks/loaders.py --short  a small dataset: does it run?

The plan (`trainer.data.loading.batch_schedule.BatchSchedule`) and what reads it
(`trainer.data.loading.histories.Histories`) are those of a run, with one loader a rank, as many
streams as ranks, and users whose lengths are drawn. Shards are counted in place of read:

- opened: shards that a loader opens in the epoch; foreign: those that are not of the rank's own
  streams; of other hosts: those of ranks that share neither page cache nor downloads.
- hashed: bytes whose sha256 is compared.
- decoded: blocks; foreign users: their share of the rank's users.
- tokens: the most that a rank has in a step over the mean, as the plan counts them.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from trainer.data.format.dataset import LENGTHS_DTYPE, Dataset, Domain, Shard
from trainer.data.format.shards import Block
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories

_SHARES = (0.4, 0.25, 0.15, 0.12, 0.08)  # of the domains in the interactions
_ROOM = 1000  # rows of a domain, which nothing here looks at
_BLOCK_USERS = 1024


@dataclass(frozen=True)
class Settings:
    """settings/loaders.yaml."""

    users: int
    shard_users: int
    user_bytes: int
    median: float
    spread: float
    max_length: int
    ranks: list[int]
    users_per_rank: list[int]
    host: int
    measured: int
    steps: int
    seed: int

    def __post_init__(self):
        counted = (
            "users",
            "shard_users",
            "user_bytes",
            "median",
            "max_length",
            "ranks",
            "users_per_rank",
            "host",
        )
        suite.at_least(1, self, *counted, "measured")
        suite.at_least(0, self, "spread", "steps", "seed")


@dataclass
class Counts:
    """What one rank's loader has done: first users of the shards that it opened, and decoded a
    block of; bytes hashed.
    """

    opened: list[int]
    decoded: list[int]
    hashed: int = 0


class CountedShard:
    """Stands for a `ShardFile`: counts what would be read, and gives users of one interaction
    each.
    """

    def __init__(
        self, counts: Counts, dataset: Dataset, shard: Shard, whole: bool
    ):
        self.counts = counts
        self.dataset = dataset
        self.shard = shard
        self._compared = False
        counts.opened.append(shard.first_user)
        if whole:
            self.compare()

    def compare(self):
        """As `ShardFile.compare`."""
        if not self._compared:
            self._compared = True
            self.counts.hashed += self.shard.bytes

    def block(self, number: int) -> Block:
        """As `ShardFile.block`."""
        self.counts.decoded.append(self.shard.first_user)
        users = min(
            self.dataset.block_users,
            self.shard.users - number * self.dataset.block_users,
        )
        return Block(
            np.ones(users, np.int32),
            np.zeros(users, np.int32),
            np.zeros(users, np.uint16),
        )

    def close(self):
        """As `ShardFile.close`."""


def main() -> None:
    """Simulates, prints, writes."""
    settings, options = suite.settings("loaders", Settings)
    record = suite.header("loaders", settings, options)
    results = []
    for ranks in settings.ranks:
        dataset = dataset_of(settings, ranks)
        results += [
            measure(dataset, ranks, users, settings)
            for users in settings.users_per_rank
        ]
    suite.save("loaders", record | {"results": results}, options)


def dataset_of(settings: Settings, streams: int) -> Dataset:
    """A dataset without files: as many shards as `prepare` would make of its users, and the
    users' lengths.
    """
    shards = streams * -(-settings.users // (streams * settings.shard_users))
    firsts = [number * settings.users // shards for number in range(shards + 1)]
    made = []
    for number in range(shards):
        users = firsts[number + 1] - firsts[number]
        made.append(
            Shard(
                f"{number:06d}.tar",
                users,
                firsts[number],
                0,
                users * settings.user_bytes,
                "",
            )
        )
    domains = [
        Domain(str(number), number * _ROOM, 2, _ROOM, 0, 0, {}, "")
        for number in range(len(_SHARES))
    ]
    facts = (
        settings.seed,
        settings.users,
        0,
        0,
        0,
        0.0,
        1.0,
        _BLOCK_USERS,
        streams,
    )
    dataset = Dataset(Path(), *facts, tuple(domains), tuple(made), ())
    random = np.random.default_rng(settings.seed)
    lengths_U = 1 + random.lognormal(
        np.log(settings.median), settings.spread, settings.users
    ).astype(np.int64)
    lengths_UD = random.multinomial(
        np.minimum(lengths_U, np.iinfo(LENGTHS_DTYPE).max), _SHARES
    )
    dataset.__dict__["lengths"] = lengths_UD.astype(
        LENGTHS_DTYPE
    )  # in place of the file's
    return dataset


def measure(
    dataset: Dataset, ranks: int, users_per_rank: int, settings: Settings
) -> dict:
    """An entry of the record's `results`."""
    plan = BatchSchedule(
        dataset,
        ranks * users_per_rank,
        ranks,
        settings.seed,
        max_length=settings.max_length,
    )
    steps = min(settings.steps or plan.steps(0), plan.steps(0))
    assigned = []
    tokens = []
    seconds = []
    for step in track(
        range(steps), f"{ranks} ranks of {users_per_rank} users", transient=True
    ):
        begin = time.perf_counter()
        assigned.append(plan.ranks(0, step))
        seconds.append(time.perf_counter() - begin)
        users_B, _, rank_B = assigned[-1]
        load_W = np.bincount(
            rank_B, weights=plan.tokens(users_B), minlength=ranks
        )
        tokens.append(load_W.max() / load_W.mean())
    measured = np.unique(
        np.linspace(0, ranks - 1, min(settings.measured, ranks)).astype(int)
    ).tolist()
    loaders = [
        simulate(plan, rank, assigned, settings.host) for rank in measured
    ]
    figures = {
        name: spread([loader[name] for loader in loaders])
        for name in loaders[0]
    }
    figures |= {"tokens": spread(tokens), "assign_seconds": spread(seconds)}
    facts = {
        "ranks": ranks,
        "users_per_rank": users_per_rank,
        "shards": len(dataset.shards),
        "steps": steps,
    }
    return facts | figures


def simulate(plan: BatchSchedule, rank: int, assigned: list, host: int) -> dict:
    """What one rank's loader does in the steps whose users were assigned."""
    home_of = {}
    for stream, shards in enumerate(plan.shards(0)):
        for shard in shards.tolist():
            home_of[plan.dataset.shards[shard].first_user] = (
                stream % plan.world_size
            )
    counts = Counts([], [])

    def open_shard(dataset, shard, _verify, _report, whole):
        return CountedShard(counts, dataset, shard, whole)

    histories = Histories.of_schedule(plan, open_shard=open_shard)
    users = foreign = 0
    for users_B, home_B, rank_B in assigned:
        histories.read(users_B[rank_B == rank], plan.home_shards(0, rank))
        users += int((rank_B == rank).sum())
        foreign += int(((rank_B == rank) & (home_B != rank)).sum())
    opened = set(counts.opened)
    return {
        "opened": len(opened),
        "foreign": sum(home_of[shard] != rank for shard in opened),
        "away": sum(home_of[shard] // host != rank // host for shard in opened),
        "hashed_bytes": counts.hashed,
        "decoded": len(counts.decoded),
        "decoded_foreign": sum(
            home_of[shard] != rank for shard in counts.decoded
        ),
        "foreign_users": foreign / max(users, 1),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean and the largest."""
    return {"mean": float(np.mean(values)), "max": float(np.max(values))}


def table(record: dict) -> str:
    """A line for each number of ranks and users: means over the ranks, the most of one in
    brackets.
    """
    rows = []
    for result in record["results"]:
        row = {
            name: f"{result[key]:,}"
            for name, key in (
                ("ranks", "ranks"),
                ("users a rank", "users_per_rank"),
            )
        }
        row |= {
            "steps": f"{result['steps']:,}",
            "shards": f"{result['shards']:,}",
        }
        for name, key in (
            ("opened", "opened"),
            ("foreign", "foreign"),
            ("of other hosts", "away"),
        ):
            row[name] = f"{result[key]['mean']:.1f} ({result[key]['max']:.0f})"
        row["MB hashed"] = f"{result['hashed_bytes']['mean'] / 1e6:,.1f}"
        row["blocks decoded"] = f"{result['decoded']['mean']:.1f}"
        row["foreign blocks"] = f"{result['decoded_foreign']['mean']:.1f}"
        row["foreign users"] = f"{result['foreign_users']['mean']:.1%}"
        row["tokens, most over mean"] = (
            f"{result['tokens']['mean']:.4f} ({result['tokens']['max']:.4f})"
        )
        row["ms a batch"] = f"{1000 * result['assign_seconds']['mean']:.0f}"
        rows.append(row)
    return suite.markdown(rows)


if __name__ == "__main__":
    main()
