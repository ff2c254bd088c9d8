"""What does a model lose that is only ever continued, day after day, and what does it save?

    python benchmarks/retraining.py log=amazon4.parquet folder=/scratch  a base and ten days: an hour
    python benchmarks/retraining.py log=amazon4.parquet --short          two days, few steps: does it run?

The log is cut by its times into a base and slices of as many interactions each, its newest. The
base is prepared and trained; then come the days, each its slice onto the dataset of the day
before (`launch/prepare.py --extend`), and then, on all data to that day,

- warm: the warm model of the day before, trained a little further (`warm_start`);
- scratch: a new model, trained until validation stops it;
- before: the warm model of the day before, as it is.

All three rank the same test items, everyone's newest of that day's dataset, among 99 others.
Seconds are of the whole process of launch/train.py, as a person starts it. Figures of training
are one seed's.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, suite
from benchmarks.chart import Panel, svg
from trainer.files.atomic import write_json
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE, METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
_TIME = "timestamp"


@dataclass(frozen=True)
class Settings:
    """settings/retraining.yaml."""

    log: str
    folder: str
    base: list[str]
    settings: list[str]
    warm_settings: list[str]
    days: int
    share: float
    min_user: int
    min_item: int

    def __post_init__(self):
        if not Path(self.log).is_file():
            raise ValueError(
                "give log=FILE.parquet with user_id, item_id, domain, timestamp"
            )
        suite.at_least(1, self, "days")
        suite.existing(self.folder)
        if not 0 < self.days * self.share < 1:
            raise ValueError(
                f"share is {self.share}: {self.days} days of it have to leave something before them"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("retraining", Settings)
    record = suite.header("retraining", settings, options) | {"results": []}
    with suite.scratch(settings.folder, "retraining-") as temporary:
        folder = Path(settings.folder or temporary)
        record["machine"]["file_system"] = machine.file_system(folder)
        logs, record["days"] = cut(settings, folder)
        cold = settings.settings
        warm = [*settings.settings, *settings.warm_settings]
        prepare(
            folder,
            0,
            logs[0],
            [
                "--keep-log",
                "--min-user",
                settings.min_user,
                "--min-item",
                settings.min_item,
            ],
        )
        base = train(settings, folder, 0, "scratch", cold)
        before = folder / "0-scratch"
        record["base"] = base | {"mean": mean_of(folder, before, 0)}
        for day in range(1, settings.days + 1):
            prepare(
                folder, day, logs[day], ["--extend", folder / f"{day - 1}-data"]
            )
            result = {"day": day, "before": mean_of(folder, before, day)}
            for kind, given in (
                ("warm", [*warm, f"warm_start={before}"]),
                ("scratch", cold),
            ):
                result[kind] = train(settings, folder, day, kind, given)
                result[kind]["mean"] = mean_of(
                    folder, folder / f"{day}-{kind}", day
                )
            before = folder / f"{day}-warm"
            record["results"].append(result)
            suite.save("retraining", record, options)
    if options.json:
        picture = options.json.with_suffix(".svg")
        picture.write_text(chart(record), encoding="utf-8")
        print(f"written: {picture}")


def cut(settings: Settings, folder: Path) -> tuple:
    """The log's parts as files, and what is in each: first and last time, interactions."""
    log = pq.read_table(settings.log)
    time_N = log[_TIME].to_numpy()
    shares = 1 - settings.share * np.arange(settings.days, 0, -1)
    ends = [
        *np.quantile(time_N, shares, method="higher").tolist(),
        time_N.max(),
    ]
    files = []
    facts = []
    last = None
    for part, end in enumerate(ends):
        chosen = pc.less_equal(log[_TIME], pa.scalar(end, log[_TIME].type))
        if last is not None:
            chosen = pc.and_(
                chosen, pc.greater(log[_TIME], pa.scalar(last, log[_TIME].type))
            )
        rows = log.filter(chosen)
        files.append(folder / f"{part}.parquet")
        pq.write_table(rows, files[-1])
        facts.append(
            {
                "interactions": len(rows),
                "first": str(pc.min(rows[_TIME])),
                "last": str(pc.max(rows[_TIME])),
            }
        )
        last = end
    return files, facts


def prepare(folder: Path, day: int, log: list[Path], given: list[str]) -> None:
    """The dataset of a day, DAY-data."""
    once(
        folder,
        f"{day}-data",
        [
            "launch/prepare.py",
            "--input",
            log,
            "--output",
            folder / f"{day}-data",
            *given,
        ],
    )


def train(
    settings: Settings, folder: Path, day: int, kind: str, given: list[str]
) -> dict:
    """The model of a day, DAY-KIND: what it took."""
    run = folder / f"{day}-{kind}"
    configs = [f"--config={file}" for file in settings.base]
    given = [
        *configs,
        *given,
        f"data={folder / f'{day}-data'}",
        f"run={run}",
        "log.tensorboard=false",
    ]
    seconds = once(folder, run.name, ["launch/train.py", *given])
    epochs = sum(
        record["kind"] == "validation"
        for record in read_records(run / METRICS_FILE)
    )
    return {"seconds": seconds, "epochs": epochs}


def mean_of(folder: Path, run: str, day: int) -> dict:
    """Test NDCG@10 of a run on a day's dataset, by domain, and "mean"."""
    name = f"{run.name}-on-{day}"
    once(
        folder,
        name,
        [
            "launch/evaluate.py",
            "--run",
            run,
            "--data",
            folder / f"{day}-data",
            "--json",
        ],
    )
    record = json.loads((folder / f"{name}.out").read_text().splitlines()[-1])
    domains = {
        domain: figures[HEADLINE]
        for domain, figures in record["domains"].items()
    }
    return domains | {"mean": record["mean"][HEADLINE]}


def once(folder: Path, name: str, command: list[str]) -> float:
    """Runs one of our scripts, where it has not been run before; returns its seconds. What it
    prints is in NAME.out.
    """
    file = folder / f"{name}.seconds"
    if not file.is_file():
        with (folder / f"{name}.out").open("w") as out:
            command = [sys.executable, *map(str, command)]
            begin = time.perf_counter()
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
            ).returncode
            seconds = time.perf_counter() - begin
        if status:
            sys.exit(f"error: {' '.join(command)} ended with status {status}")
        write_json(file, seconds)
    return json.loads(file.read_text())


def table(record: dict) -> str:
    """A line for each day, and what all days took."""
    rows = [
        {
            "day": result["day"],
            "interactions": f"{record['days'][result['day']]['interactions']:,}",
            "before": f"{result['before']['mean']:.4f}",
            "warm": f"{result['warm']['mean']['mean']:.4f}",
            "scratch": f"{result['scratch']['mean']['mean']:.4f}",
            "warm against scratch": f"{_share(result) - 1:+.1%}".replace(
                "-", "−"
            ),
            "warm s": f"{result['warm']['seconds']:.0f}",
            "scratch s": f"{result['scratch']['seconds']:.0f}",
            "scratch epochs": result["scratch"]["epochs"],
            "of its time": f"{result['warm']['seconds'] / result['scratch']['seconds']:.0%}",
        }
        for result in record["results"]
    ]
    lines = [suite.markdown(rows)]
    if record["results"]:
        shares = [_share(result) for result in record["results"]]
        warm, scratch = (
            sum(result[kind]["seconds"] for result in record["results"])
            for kind in ("warm", "scratch")
        )
        base = record["base"]
        lines.append(
            "\nTest NDCG@10, mean of the domains. Base: "
            f"{record['days'][0]['interactions']:,} interactions, "
            f"{base['mean']['mean']:.4f} on its own test items after {base['seconds']:.0f} "
            "s. All days: warm has "
            f"{np.mean(shares):.3f} of scratch's figure (least {min(shares):.3f}), in "
            f"{warm / scratch:.0%} of its time."
        )
    return "\n".join(lines)


def chart(record: dict) -> str:
    """NDCG@10 and seconds by day."""
    days = [str(result["day"]) for result in record["results"]]
    means = {
        "warm": [
            result["warm"]["mean"]["mean"] for result in record["results"]
        ],
        "scratch": [
            result["scratch"]["mean"]["mean"] for result in record["results"]
        ],
        "before": [result["before"]["mean"] for result in record["results"]],
    }
    seconds = {
        kind: [result[kind]["seconds"] for result in record["results"]]
        for kind in ("warm", "scratch")
    }
    return svg(
        [
            Panel(
                "Everyone's newest item, all data to that day",
                days,
                means,
                "day",
                f"test {HEADLINE}",
            ),
            Panel(
                "What a day's training takes", days, seconds, "day", "seconds"
            ),
        ]
    )


def _share(result):
    return result["warm"]["mean"]["mean"] / result["scratch"]["mean"]["mean"]


if __name__ == "__main__":
    main()
