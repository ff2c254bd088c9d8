"""How evenly do ranks share a batch's tokens, and the table's shards its rows? Ranks are simulated, none is started.

    python benchmarks/balance.py --data DATA                        8 and 64 ranks of 128 users, 1,000 steps
    python benchmarks/balance.py --data DATA --ranks 2 4 --users-per-rank 32 --steps 200

- Tokens: those of both views by rank, as the trainer counts them when it assigns users (`trainer.data.balance.view_tokens`: one
  a user more than there are). plain leaves every user on the rank that owns its stream, balanced is `trainer.data.plan.Plan`
  as it trains. The figure of a step is the most that a rank has over the mean; away is the share of users on another rank than
  their own.
- Rows: look-ups of the interactions that are trained on by shard of the table, all ranks together, the most over the mean: in a
  step, and of all steps' sums. scattered is where `embeddings.rows.RowScatter` puts rows, unscattered as they are numbered;
  distinct counts a row once for each rank that looks it up in a step. Negatives are left out: they are drawn evenly.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.options import positive
from embeddings.rows import RowScatter
from syncrec.batch import trim
from trainer.checkpoint import write_json
from trainer.data.dataset import SPLIT_LENGTH, Dataset
from trainer.data.histories import Histories
from trainer.data.plan import Plan
from trainer.data.stream import domains_of, training_part
from trainer.errors import InputError, exit_on_input_error


@exit_on_input_error
def main():
    """Simulates, prints, writes."""
    options = parse()
    console = Console()
    facts = machine.describe(torch.device("cpu"))
    dataset = Dataset.load(options.data)
    results, not_run = [], []
    for ranks in options.ranks:
        try:
            results.append(measure(dataset, ranks, options, console))
        except InputError as error:
            not_run.append({"ranks": ranks, "reason": str(error)})
    record = {
        "command": "python benchmarks/balance.py " + " ".join(sys.argv[1:]),
        "settings": {name: getattr(options, name) for name in ("users_per_rank", "max_length", "steps", "row_steps", "seed")},
        "machine": facts,
        "dataset": {
            "fingerprint": dataset.fingerprint,
            "users": dataset.users,
            "interactions": dataset.interactions,
            "rows": dataset.num_embeddings,
            "domains": len(dataset.domains),
            "streams": dataset.streams,
        },
        "results": results,
        "not_run": not_run,
    }
    show(console, record)
    write_json(options.output, record)
    console.print(f"written: {options.output}")
    sys.exit(not results)


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared dataset")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[8, 64], help="numbers of ranks (8 64)")
    parser.add_argument("--users-per-rank", type=positive, default=128, help="users of each rank in a step (128)")
    parser.add_argument("--max-length", type=positive, default=128, help="tokens of a sequence at most (128)")
    parser.add_argument("--steps", type=positive, default=1000, help="steps whose tokens are counted (1000)")
    parser.add_argument("--row-steps", type=positive, default=100, help="steps whose rows are counted, which are read (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the epochs' orders (0)")
    beside = Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=Path, default=beside, help="the JSON (balance.json beside this script)")
    options = parser.parse_args(arguments)
    if not options.output.resolve().parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.resolve().parent}")
    return options


def measure(dataset, ranks, options, console):
    """Tokens and rows at one number of ranks: an entry of the JSON's `results`. Raises InputError as `Plan` does."""
    plan = Plan(dataset, ranks * options.users_per_rank, ranks, options.seed, max_length=options.max_length)
    found = {"ranks": ranks, "epochs": 1 + plan.locate(options.steps - 1)[0]}
    found["tokens"] = tokens(plan, options.steps, console)
    found["rows"] = rows(plan, options.row_steps, console)
    return found


def tokens(plan, steps, console):
    """How evenly tokens lie, plain and balanced, and what finding out takes."""
    ratios, away, seconds = defaultdict(list), [], []
    for position in track(range(steps), f"{plan.world_size} ranks, tokens", console=console, transient=True):
        begin = time.perf_counter()
        users_B, home_B, rank_B = plan.ranks(*plan.locate(position))
        seconds.append(time.perf_counter() - begin)
        cost_B = plan.tokens(users_B)
        for name, of_B in (("plain", home_B), ("balanced", rank_B)):
            ratios[name].append(most_over_mean(np.bincount(of_B, weights=cost_B, minlength=plan.world_size)))
        away.append(float((rank_B != home_B).mean()))
    found = {name: summary(values) for name, values in ratios.items()}
    return found | {"away": summary(away), "assign_seconds": summary(seconds)}


def rows(plan, steps, console):
    """How evenly look-ups lie on the table's shards, scattered and not."""
    dataset, shards = plan.dataset, plan.world_size
    where = {"scattered": RowScatter(dataset.num_embeddings).stored, "unscattered": lambda row: row}
    in_shard = -(-dataset.num_embeddings // shards)
    histories = Histories(dataset, 2 * dataset.streams)
    ratios, sums = defaultdict(list), defaultdict(lambda: np.zeros(shards, np.int64))
    by_row = np.zeros(dataset.num_embeddings, np.int64)
    for position in track(range(steps), f"{shards} ranks, rows", console=console, transient=True):
        users_B, _, rank_B = plan.ranks(*plan.locate(position))
        row_N, rank_N = interactions(dataset, histories.read(users_B), rank_B, plan.max_length)
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
        found[name][counted] = {"step": summary(values), "sum": most_over_mean(sums[name, counted])}
    return found | {"shares_of_most_popular": (np.sort(by_row)[::-1][:10] / by_row.sum()).tolist()}


def interactions(dataset, users, rank_B, max_length):
    """Rows, int64, and rank of each interaction that the users' ranks train on."""
    lengths_B = np.where(users.lengths_B >= SPLIT_LENGTH, users.lengths_B - 2, users.lengths_B)
    row_N = users.items_N[training_part(users, lengths_B)]
    row_N, lengths_B, _ = trim(row_N, lengths_B, domains_of(dataset, row_N), max_length)
    return row_N.astype(np.int64), np.repeat(rank_B, lengths_B)


def most_over_mean(values):
    """1 where all have equally much."""
    return float(values.max() / values.mean())


def summary(values):
    """Mean, 99th percentile and the largest."""
    return {"mean": float(np.mean(values)), "p99": float(np.percentile(values, 99)), "max": float(np.max(values))}


def show(console, record):
    """Two tables, tokens and rows."""
    settings = record["settings"]
    title = f"Tokens of the fullest rank over the mean: {settings['users_per_rank']} users a rank, T={settings['max_length']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("ranks", "plain", "p99", "max", "balanced", "p99", "max", "away", "ms a batch"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in record["results"]:
        found = result["tokens"]
        ratios = [f"{found[name][part]:.4f}" for name in ("plain", "balanced") for part in ("mean", "p99", "max")]
        seconds = found["assign_seconds"]["mean"]
        table.add_row(str(result["ranks"]), *ratios, f"{found['away']['mean']:.2%}", f"{1000 * seconds:.2f}")
    console.print(table)
    title = "Look-ups of the fullest shard over the mean"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("ranks", justify="right")
    table.add_column("rows are")
    for name in ("in a step", "p99", "of all", "distinct, in a step", "p99", "of all"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in record["results"]:
        for name in ("scattered", "unscattered"):
            cells = []
            for counted in ("lookups", "distinct"):
                found = result["rows"][name][counted]
                cells += [f"{found['step']['mean']:.3f}", f"{found['step']['p99']:.3f}", f"{found['sum']:.3f}"]
            table.add_row(str(result["ranks"]), name, *cells)
    console.print(table)
    for result in record["results"]:
        share = result["rows"]["shares_of_most_popular"][0]
        ranks = result["ranks"]
        console.print(f"{ranks} ranks: a shard's share is {1 / ranks:.2%}, the most popular row's {share:.2%}")
    for left_out in record["not_run"]:
        console.print(f"{left_out['ranks']} ranks, not run: {left_out['reason']}", soft_wrap=True)


if __name__ == "__main__":
    main()
