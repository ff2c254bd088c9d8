"""How evenly do ranks share a batch's tokens, and the table's shards its rows? Ranks are
simulated, none is started.

    python benchmarks/balance.py data=DATA  8 and 64 ranks of 128 users, 1,000 steps
    python benchmarks/balance.py data=DATA ranks=[2,4] users_per_rank=32 steps=200
    python benchmarks/balance.py --short    a small dataset of its own: does it run?

- Tokens: those of both views by rank, as the trainer counts them when it assigns users
  (`trainer.data.loading.token_balance.count_view_tokens`: one a user more than there are).
  plain leaves every user on the rank that owns its stream, balanced is
  `trainer.data.loading.batch_schedule.BatchSchedule` as it trains. The figure of a step is the most that
  a rank has over the mean; away is the share of users on another rank than their own.
- Rows: look-ups of the interactions that are trained on by shard of the table, all ranks
  together, the most over the mean: in a step, and of all steps' sums. scattered is where
  `embeddings.row_scatter.RowScatter` puts rows, unscattered as they are numbered; distinct
  counts a row once for each rank that looks it up in a step. Negatives are left out: they are
  drawn evenly.
"""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from benchmarks.workload import described, prepared, some_data
from embeddings.row_scatter import RowScatter
from syncrec.batch.build import trim
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories
from trainer.data.loading.stream import find_domains, select_training_part
from trainer.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from trainer.data.loading.histories import UserHistories


@dataclass(frozen=True)
class Settings:
    """settings/balance.yaml."""

    data: str
    users: int
    ranks: list[int]
    users_per_rank: int
    max_length: int
    steps: int
    row_steps: int
    seed: int

    def __post_init__(self):
        suite.at_least(
            1,
            self,
            "ranks",
            "users_per_rank",
            "max_length",
            "steps",
            "row_steps",
        )
        suite.at_least(0, self, "seed")
        some_data(self)


@exit_on_input_error
def main() -> None:
    """Simulates, prints, writes."""
    settings, options = suite.settings("balance", Settings)
    record = suite.header("balance", settings, options)
    results = []
    not_run = []
    with suite.scratch("") as folder:
        dataset = Dataset.load(
            settings.data or prepared(Path(folder), settings.users)
        )
        for ranks in settings.ranks:
            try:
                results.append(measure(dataset, ranks, settings))
            except InputError as error:
                not_run.append({"ranks": ranks, "reason": str(error)})
    suite.save(
        "balance",
        record
        | {
            "dataset": described(dataset),
            "results": results,
            "not_run": not_run,
        },
        options,
    )
    sys.exit(not results)


def measure(dataset: Dataset, ranks: int, settings: Settings) -> dict:
    """Tokens and rows at one number of ranks: an entry of the record's `results`. Raises
    InputError as `BatchSchedule` does.
    """
    plan = BatchSchedule(
        dataset,
        ranks * settings.users_per_rank,
        ranks,
        settings.seed,
        max_length=settings.max_length,
    )
    found = {"ranks": ranks, "epochs": 1 + plan.locate(settings.steps - 1)[0]}
    return found | {
        "tokens": tokens(plan, settings.steps),
        "rows": rows(plan, settings.row_steps),
    }


def tokens(plan: BatchSchedule, steps: int) -> dict:
    """How evenly tokens lie, plain and balanced, and what finding out takes."""
    ratios = defaultdict(list)
    away = []
    seconds = []
    for position in track(
        range(steps), f"{plan.world_size} ranks, tokens", transient=True
    ):
        begin = time.perf_counter()
        users_B, home_B, rank_B = plan.ranks(*plan.locate(position))
        seconds.append(time.perf_counter() - begin)
        cost_B = plan.tokens(users_B)
        for name, of_B in (("plain", home_B), ("balanced", rank_B)):
            ratios[name].append(
                most_over_mean(
                    np.bincount(of_B, weights=cost_B, minlength=plan.world_size)
                )
            )
        away.append(float((rank_B != home_B).mean()))
    found = {name: summary(values) for name, values in ratios.items()}
    return found | {"away": summary(away), "assign_seconds": summary(seconds)}


def rows(plan: BatchSchedule, steps: int) -> dict:
    """How evenly look-ups lie on the table's shards, scattered and not."""
    dataset = plan.dataset
    shards = plan.world_size
    where = {
        "scattered": RowScatter(dataset.num_embeddings).stored,
        "unscattered": lambda row: row,
    }
    in_shard = -(-dataset.num_embeddings // shards)
    histories = Histories(dataset, 2 * dataset.streams)
    ratios = defaultdict(list)
    sums = defaultdict(lambda: np.zeros(shards, np.int64))
    by_row = np.zeros(dataset.num_embeddings, np.int64)
    for position in track(
        range(steps), f"{shards} ranks, rows", transient=True
    ):
        users_B, _, rank_B = plan.ranks(*plan.locate(position))
        row_N, rank_N = interactions(
            dataset, histories.read(users_B), rank_B, plan.max_length
        )
        by_row += np.bincount(row_N, minlength=len(by_row))
        distinct = np.unique(rank_N * len(by_row) + row_N) % len(by_row)
        for counted, of in (("lookups", row_N), ("distinct", distinct)):
            for name, stored in where.items():
                counts_W = np.bincount(stored(of) // in_shard, minlength=shards)
                ratios[name, counted].append(most_over_mean(counts_W))
                sums[name, counted] += counts_W
    histories.close()
    found = {name: {} for name in where}
    for (name, counted), values in ratios.items():
        found[name][counted] = {
            "step": summary(values),
            "sum": most_over_mean(sums[name, counted]),
        }
    return found | {
        "shares_of_most_popular": (
            np.sort(by_row)[::-1][:10] / by_row.sum()
        ).tolist()
    }


def interactions(
    dataset: Dataset,
    users: "UserHistories",
    rank_B: np.ndarray,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows, int64, and rank of each interaction that the users' ranks train on."""
    _, lengths_B, place_N, _ = select_training_part(dataset, users)
    row_N = users.items_N[place_N]
    row_N, lengths_B, _ = trim(
        row_N, lengths_B, find_domains(dataset, row_N), max_length
    )
    return row_N.astype(np.int64), np.repeat(rank_B, lengths_B)


def most_over_mean(values: np.ndarray) -> float:
    """1 where all have equally much."""
    return float(values.max() / values.mean())


def summary(values: list[float]) -> dict[str, float]:
    """Mean, 99th percentile and the largest."""
    return {
        "mean": float(np.mean(values)),
        "p99": float(np.percentile(values, 99)),
        "max": float(np.max(values)),
    }


def table(record: dict) -> str:
    """Two tables, tokens and rows, and the share of the most popular row."""
    by_tokens = []
    by_rows = []
    lines = []
    for result in record["results"]:
        found = result["tokens"]
        ranks = result["ranks"]
        ratios = {
            f"{name}: {part}": f"{found[name][part]:.3f}"
            for name in ("plain", "balanced")
            for part in ("mean", "p99", "max")
        }
        milliseconds = f"{1000 * found['assign_seconds']['mean']:.2f}"
        by_tokens.append(
            {
                "ranks": ranks,
                **ratios,
                "away": f"{found['away']['mean']:.1%}",
                "ms a batch": milliseconds,
            }
        )
        for name in ("scattered", "unscattered"):
            of = result["rows"][name]
            row = {"ranks": ranks, "rows are": name}
            for counted, label in (
                ("lookups", "look-ups"),
                ("distinct", "distinct"),
            ):
                row |= {
                    f"{label} in a step: {part}": f"{of[counted]['step'][part]:.3f}"
                    for part in ("mean", "p99")
                }
                row[f"{label} of all steps"] = f"{of[counted]['sum']:.3f}"
            by_rows.append(row)
        share = result["rows"]["shares_of_most_popular"][0]
        lines.append(
            f"{ranks} ranks: a shard's share is {1 / ranks:.2%}, the most popular row's "
            f"{share:.2%}."
        )
    lines += [
        f"{left_out['ranks']} ranks, not run: {left_out['reason']}."
        for left_out in record["not_run"]
    ]
    tables = [
        "Tokens:",
        suite.markdown(by_tokens),
        "Rows:",
        suite.markdown(by_rows),
    ]
    return "\n\n".join(tables + lines)


if __name__ == "__main__":
    main()
