"""Does bf16 train as fp32 does? Loss curves and NDCG@10 of runs on real logs, beside the noise
of seeds.

    python benchmarks/precision.py data=DATA  a dataset of launch/prepare.py; minutes a run
    python benchmarks/precision.py --short    a small dataset of its own: does it run?

Every precision trains with every seed, by `launch/train.py`. A seed settles the order of users,
the negatives, the start and the masks of dropout, so two runs of one seed differ by precision
alone. Compared are the training losses of the last quarter of the logged intervals: the mean
over them by run, and the mean distance between two runs at the same step.
"""

import itertools
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import chart, suite
from benchmarks.workload import described, prepared, some_data
from trainer.data.format.dataset import Dataset
from trainer.errors import exit_on_input_error
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE, METRICS_FILE

_ROOT = Path(__file__).resolve().parents[1]
_LAST = 4  # the share of a run's intervals that is compared is one of so many


@dataclass(frozen=True)
class Settings:
    """settings/precision.yaml."""

    data: str
    users: int
    preset: str
    arguments: list[str]
    precision: list[str]
    seeds: list[int]

    def __post_init__(self):
        if len(self.seeds) < 2:
            raise ValueError(
                f"seeds is {self.seeds}: give at least 2, whose difference is the noise"
            )
        some_data(self)


@exit_on_input_error
def main() -> None:
    """Trains, compares, prints, writes."""
    settings, options = suite.settings("precision", Settings)
    with suite.scratch("") as made:
        folder = Path(made)
        data = settings.data or prepared(folder, settings.users)
        record = suite.header("precision", settings, options) | {
            "dataset": described(Dataset.load(data)),
            "results": [],
        }
        for precision, seed in track(
            list(itertools.product(settings.precision, settings.seeds)), "runs"
        ):
            found = trained(settings, data, folder, precision, seed)
            record["results"].append(
                {"precision": precision, "seed": seed} | found
            )
    suite.save("precision", record, options)
    if options.json:
        options.json.with_suffix(".svg").write_text(
            picture(record), encoding="utf-8"
        )


def trained(
    settings: Settings, data: Path, folder: Path, precision: str, seed: int
) -> dict:
    """One run: its losses by step, and its test NDCG@10."""
    run = folder / f"{precision}-{seed}"
    given = [
        f"data={data}",
        f"run={run}",
        f"seed={seed}",
        f"model.precision={precision}",
        *settings.arguments,
    ]
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        settings.preset,
        *given,
    ]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"error: {run.name} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    records = read_records(run / METRICS_FILE)
    steps = [record for record in records if record["kind"] == "train"]
    (test,) = [record for record in records if record["kind"] == "test"]
    return {
        "steps": [record["step"] for record in steps],
        "losses": [record["loss"] for record in steps],
        "test": test["mean"][HEADLINE],
    }


def distance(one: dict, other: dict) -> float:
    """Mean distance of two runs' losses at the same steps of the last part."""
    last = len(one["losses"]) - max(1, len(one["losses"]) // _LAST)
    pairs = zip(one["losses"][last:], other["losses"][last:], strict=True)
    return statistics.mean(abs(a - b) for a, b in pairs)


def table(record: dict) -> str:
    """Markdown: a line for each precision, and what lies between runs."""
    runs = {(run["precision"], run["seed"]): run for run in record["results"]}
    first, *others = dict.fromkeys(
        run["precision"] for run in record["results"]
    )
    seeds = list(dict.fromkeys(run["seed"] for run in record["results"]))
    rows = []
    for precision in (first, *others):
        own = [runs[precision, seed] for seed in seeds]
        last = [
            statistics.mean(
                run["losses"][-max(1, len(run["losses"]) // _LAST) :]
            )
            for run in own
        ]
        ranked = [run["test"] for run in own]
        rows.append(
            {
                "precision": precision,
                "loss at the end, mean of seeds": f"{statistics.mean(last):.4f}",
                "of each seed": ", ".join(f"{value:.4f}" for value in last),
                "test NDCG@10, mean": f"{statistics.mean(ranked):.4f}",
                "each seed's": ", ".join(f"{value:.4f}" for value in ranked),
            }
        )
    noise = statistics.mean(
        distance(runs[first, a], runs[first, b])
        for a, b in itertools.combinations(seeds, 2)
    )
    between = [
        f"{other} and {first}, same seed: "
        f"{statistics.mean(distance(runs[other, s], runs[first, s]) for s in seeds):.4f}"
        for other in others
    ]
    return (
        suite.markdown(rows)
        + "\n\nMean distance of two runs' losses at the same step: "
        + "; ".join([f"two seeds of {first}: {noise:.4f}", *between])
        + "."
    )


def picture(record: dict) -> str:
    """All runs' losses as SVG: colours are seeds, dashes the other precision."""
    first, *others = dict.fromkeys(
        run["precision"] for run in record["results"]
    )
    places = [str(step) for step in record["results"][0]["steps"]]
    of = {
        precision: {
            f"seed {run['seed']}": run["losses"]
            for run in record["results"]
            if run["precision"] == precision
        }
        for precision in (first, *others)
    }
    title = f"Training loss: {first}" + "".join(
        f", {other} dashed" for other in others
    )
    return chart.svg(
        [
            chart.Panel(
                title,
                places,
                of[first],
                "step",
                "loss",
                dashed=of[others[0]] if others else {},
            )
        ]
    )


if __name__ == "__main__":
    main()
