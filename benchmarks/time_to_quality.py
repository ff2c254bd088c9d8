"""How long does each system take to be as good as it gets, on the same cores, on the same lists?

    make peers                                      RecBole's and RecTools' environments
    python benchmarks/time_to_quality.py            its logs lie beside the project; seven hours
    python benchmarks/time_to_quality.py folder=KEPT systems=[SASRec]   KEPT holds what a later call goes on with
    taskset -c 0 python benchmarks/time_to_quality.py …                 on one core
    python benchmarks/time_to_quality.py --short    a small synthetic log: does it run?

Ours is what a person starts: `launch/train.py` with a preset, loader processes and all. RecTools and
RecBole train by their own trainers and loaders, in environments of their own
(trainer/study/peers), one system after the other.

- NDCG@10: of the validation items among 99 drawn from their domains, the mean over domains, after
  every epoch. Every system ranks the same lists, by the same code (trainer/evaluation/metrics.py).
  By leave-one-out and by the timeline each trains on the same interactions.
- wall: seconds from the start of the process: imports, reading, training, and all validations so
  far. training: the training alone, without start-up and without any validation.
- CPU: seconds that the cores computed from the start of the process, for it and its loader
  processes. On a machine that others load, it is the clock to compare by.
- test: of the model of the epoch with the best validation.
- interactions/s: interactions that an epoch predicts, each counted once, by its seconds of training.
- memory: the peak of the process that trains, without loader processes.
"""

import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, suite
from benchmarks.chart import Curves, svg
from benchmarks.recbole_peer import ROOT, output
from trainer import Run
from trainer.config.evaluation import EvaluationConfig
from trainer.config.load import load_config
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.timeline import split_dataset
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs
from trainer.distributed.process_group import join_process_group
from trainer.errors import exit_on_input_error
from trainer.evaluation.metrics import domains_of_mean, mean_ndcg
from trainer.evaluation.user_ranks import read_ranks
from trainer.reporting.run_log import read_records
from trainer.run_files import CONFIG, HEADLINE, METRICS_FILE
from trainer.study.peers.bridge import RANKS, Peer, run_peer
from trainer.study.peers.interface import PeerDataset
from trainer.study.peers.recbole_bridge import RECBOLE
from trainer.study.peers.rectools_bridge import RECTOOLS

NAME = "time_to_quality"
SHARE = 0.95  # of a best NDCG@10, which a system is timed to
OURS = ("SASRec", "SyNCRec")
CLOCKS = ("wall", "training", "cpu")
PEERS: dict[str, Peer] = {
    "RecTools SASRec": RECTOOLS,
    "RecTools eSASRec": RECTOOLS,
    "RecBole SASRec": RECBOLE,
}
_TITLES = {"leave_one_out": "leave-one-out", "timeline": "timeline"}
_EPOCHS = 300  # of a peer, at most
_LOOKS = 0.5  # seconds between two looks at the processes

Result = dict[
    str, Any
]  # a system on a split of a log: an entry of the record's `results`


@dataclass(frozen=True)
class Settings:
    """settings/time_to_quality.yaml."""

    logs: dict[str, str]
    users: int
    min_interactions: int
    folder: str
    recbole_python: str
    rectools_python: str
    splits: list[Literal["leave_one_out", "timeline"]]
    systems: list[str]
    seed: int
    minutes: float
    patience: int
    epochs: int
    ours: dict[str, dict[str, list[str]]]
    timeline: list[str]
    timeline_of: dict[str, list[str]]
    rectools: dict[str, Any]
    ligr: dict[str, Any]
    recbole: dict[str, Any]

    def __post_init__(self) -> None:
        suite.existing(self.folder)
        suite.at_least(1, self, "min_interactions")
        if not self.names:
            raise ValueError(
                "give logs.NAME=FILE.parquet, or users=… of a synthetic log"
            )
        for system in self.systems:
            if system not in (*OURS, *PEERS):
                known = ", ".join((*OURS, *PEERS))
                raise ValueError(
                    f"systems has {system}, which is none of {known}"
                )
            python = ROOT / peer_python(self, system)
            if not python.is_file():
                raise ValueError(
                    f"{system} needs {python.name} in {python.parents[1].name}, which is not "
                    "there: make peers"
                )

    @property
    def names(self) -> list[str]:
        """Of the logs."""
        return ["synthetic"] if self.users else list(self.logs)


def peer_python(settings: Settings, system: str) -> str:
    """The Python that trains a system."""
    if system in OURS:
        return sys.executable
    if PEERS[system] is RECTOOLS:
        return settings.rectools_python
    return settings.recbole_python


def peer_options(settings: Settings, system: str) -> dict[str, Any]:
    """A peer's own settings."""
    if PEERS[system] is RECBOLE:
        return settings.recbole
    if system == "RecTools eSASRec":
        return settings.rectools | settings.ligr
    return settings.rectools


@exit_on_input_error
def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings(NAME, Settings)
    record = suite.header(NAME, settings, options)
    record |= {"datasets": {}, "results": []}
    with suite.scratch("", "quality-") as temporary:
        for log in settings.names:
            place = Path(settings.folder or temporary).resolve() / log
            work = Work(settings, log, place)
            record["datasets"][log] = work.facts()
            for split in settings.splits:
                for system in settings.systems:
                    result = work.measure(split, system)
                    record["results"].append(result)
                    print(progress(result), flush=True)
    suite.save(NAME, record, options)
    if options.json and record["results"]:
        picture = options.json.with_suffix(".svg")
        picture.write_text(chart(record), encoding="utf-8")
        print(f"written: {picture}")


class Work:
    """A log's folder: the prepared dataset, what peers are handed, runs, and what was measured."""

    def __init__(self, settings: Settings, log: str, folder: Path) -> None:
        self.settings = settings
        self.log = log
        self.folder = folder
        folder.mkdir(exist_ok=True)
        if not (folder / "data" / "dataset.json").is_file():
            self._prepare()
        self.dataset = Dataset.load(folder / "data")

    def _prepare(self) -> None:
        settings = self.settings
        if settings.users:
            log = self.folder / "logs"
            config = SyntheticConfig(
                users=settings.users, items=2000, domains=4, mean_length=30
            )
            synthesize_logs(log, config)
        else:
            log = ROOT / settings.logs[self.log]
        config = PrepareConfig(
            inputs=(str(log),),
            output=str(self.folder / "data"),
            min_user=settings.min_interactions,
            min_item=settings.min_interactions,
        )
        prepare(config)

    def facts(self) -> dict[str, Any]:
        """What the record says of the dataset."""
        return {
            "users": self.dataset.users,
            "interactions": self.dataset.interactions,
            "items": sum(domain.items for domain in self.dataset.domains),
            "domains": len(self.dataset.domains),
            "fingerprint": self.dataset.fingerprint,
        }

    def measure(self, split: str, system: str) -> Result:
        """A system on a split, or what an earlier call found of it."""
        task = self._task(split, system)
        name = f"{split}-{system.replace(' ', '-')}"
        folder = self.folder / name

        def run() -> Result:
            before = {
                "log": self.log,
                "split": split,
                "system": system,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "cores": len(os.sched_getaffinity(0)),
                "load_before": os.getloadavg()[0],
            }
            # What was begun and not finished has no time of its own.
            shutil.rmtree(folder, ignore_errors=True)
            with CpuClock() as clock:
                if system in OURS:
                    found = self._train(folder, split, task)
                else:
                    found = self._train_peer(folder, split, system, task)
            started = found.pop("started")
            for point in found["curve"]:
                moment = started + point["wall_seconds"]
                point["cpu_seconds"] = clock.seconds_at(moment)
            return before | found

        return suite.once(self.folder / f"{name}.json", task, run)

    def _task(self, split: str, system: str) -> dict[str, Any]:
        """What a system is to do: arguments of launch/train.py, or a peer's task."""
        settings = self.settings
        if system not in OURS:
            return {
                "model": "SASRec",
                "seed": settings.seed,
                "options": peer_options(settings, system),
                "epochs": settings.epochs or _EPOCHS,
                "patience": settings.patience,
                "minutes": settings.minutes,
                "evaluation_seed": settings.seed,
                "negatives": EvaluationConfig().negatives,
                "min_users": EvaluationConfig().min_users,
            }
        of_log = settings.ours.get(self.log, settings.ours["other"])
        arguments = [*of_log[system]]
        if split == "timeline":
            arguments += settings.timeline_of.get(system, [])
            arguments += settings.timeline
        arguments.append(f"seed={settings.seed}")
        if settings.epochs:
            arguments.append(f"epochs={settings.epochs}")
        return {"arguments": arguments}

    def _train(
        self,
        folder: Path,
        split: str,
        task: dict[str, Any],
    ) -> Result:
        """Trains ours, as a person starts it."""
        command = [
            sys.executable,
            "launch/train.py",
            *task["arguments"],
            "log.tensorboard=false",
            f"data={self.dataset.folder}",
            f"run={folder}",
        ]
        begun = time.time()
        output(command, folder.with_suffix(".log"))
        # The run's own clock begins when it has written its settings.
        start_up = (folder / CONFIG).stat().st_mtime - begun
        records = read_records(folder / METRICS_FILE)
        validations = of_kind(records, "validation")
        (test,) = of_kind(records, "test")
        trained = of_kind(records, "train")
        config = Run.open(folder).config
        lengths_U = self._split_dataset(split).lengths.sum(1, dtype=np.int64)
        samples = np.minimum(lengths_U, config.model.max_length).sum()
        curve = our_curve(validations, start_up)
        return {
            "started": begun,
            "arguments": task["arguments"],
            "curve": curve,
            "start_up_seconds": start_up,
            "best_epoch": test["epoch"],
            "test": test["mean"][HEADLINE],
            "stopped": (
                "patience" if len(validations) < config.epochs else "all epochs"
            ),
            "interactions_per_epoch": int(samples),
            "interactions_per_second": rate(int(samples), curve),
            "memory_bytes": 2**30
            * max(record["memory_gb"] for record in trained),
        }

    def _train_peer(
        self,
        folder: Path,
        split: str,
        system: str,
        task: dict[str, Any],
    ) -> Result:
        """Trains a peer on what it is handed."""
        given = self.folder / f"given-{split}"
        found = run_peer(
            PEERS[system],
            self._split_dataset(split),
            folder,
            ROOT / peer_python(self.settings, system),
            task,
            given=given,
        )
        test = mean_of_test(
            PeerDataset(given), read_ranks(folder / RANKS), task["min_users"]
        )
        curve = peer_curve(found)
        return {
            "started": found["began"] - found["start_up_seconds"],
            "options": task["options"],
            "curve": curve,
            "start_up_seconds": found["start_up_seconds"],
            "best_epoch": found["best_epoch"],
            "test": test,
            "stopped": found["stopped"],
            "interactions_per_epoch": found["samples_per_epoch"],
            "interactions_per_second": rate(found["samples_per_epoch"], curve),
            "memory_bytes": found["memory_bytes"],
            "weights": found["weights"],
            "threads": found["threads"],
            "versions": found["versions"],
        }

    def _split_dataset(self, split: str) -> Dataset:
        """The dataset as ours splits it."""
        given = self.settings.timeline if split == "timeline" else []
        config = load_config([], [*given, f"seed={self.settings.seed}"])
        environment = dict(os.environ)
        try:
            with join_process_group(device="cpu") as ranks:
                return split_dataset(self.dataset, config, ranks)
        finally:
            # What describes the group is not for the systems that are started.
            os.environ.clear()
            os.environ.update(environment)


class CpuClock:
    """What the processes that are started meanwhile have computed, by the time of day."""

    def __init__(self) -> None:
        self._before = frozenset(machine.cpu_seconds_by_child())
        self._moments: list[float] = []
        self._seconds: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "CpuClock":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._moments.append(time.time())
            self._seconds.append(self._sum())
            self._ended.wait(_LOOKS)

    def _sum(self) -> float:
        total = 0.0
        for process, seconds in machine.cpu_seconds_by_child().items():
            if process not in self._before:
                total += seconds
        return total

    def seconds_at(self, moment: float) -> float:
        """By a moment, in seconds since 1970."""
        # What has ended is not seen any more.
        so_far = np.maximum.accumulate(self._seconds)
        return float(np.interp(moment, self._moments, so_far))


def of_kind(records: list[dict], kind: str) -> list[dict]:
    """The records of one kind."""
    return [record for record in records if record["kind"] == kind]


def our_curve(validations: list[dict], start_up: float) -> list[dict]:
    """A point an epoch, of a run's validations."""
    curve = []
    validating = 0.0
    for record in validations:
        validating += record["validation_seconds"]
        curve.append(
            {
                "epoch": record["epoch"],
                "wall_seconds": start_up + record["seconds"],
                "training_seconds": record["seconds"] - validating,
                "validation": record["mean"][HEADLINE],
            }
        )
    return curve


def peer_curve(found: dict) -> list[dict]:
    """A point an epoch, of what `run_peer` returns."""
    curve = []
    training = 0.0
    for epoch in found["epochs"]:
        training += epoch["training_seconds"]
        curve.append(
            {
                "epoch": epoch["epoch"],
                "wall_seconds": found["start_up_seconds"] + epoch["seconds"],
                "training_seconds": training,
                "validation": epoch["validation"],
            }
        )
    return curve


def mean_of_test(
    handed: PeerDataset, ranks: dict[str, np.ndarray], min_users: int
) -> float:
    """The test's NDCG@10 of a peer, over the domains that count in the validation, as of ours.

    ranks: columns of test targets (trainer/evaluation/user_ranks.py).
    """
    rows_TC = handed.load("candidates-validation")
    numbers, counts = np.unique(
        handed.domain_of(rows_TC[:, 0]), return_counts=True
    )
    users = dict(zip(map(str, numbers), counts.tolist(), strict=True))
    counted = list(map(int, domains_of_mean(users, min_users)))
    is_counted = np.isin(ranks["domain"], counted)
    return mean_ndcg(ranks["sampled"][is_counted], ranks["domain"][is_counted])


def rate(interactions: int, curve: list[dict]) -> float:
    """Interactions/s of training. interactions: of each epoch."""
    return interactions * len(curve) / curve[-1]["training_seconds"]


def best_of(result: Result) -> float:
    """A system's best NDCG@10 of the validation."""
    return max(point["validation"] for point in result["curve"])


def seconds_to(result: Result, level: float, clock: str) -> float | None:
    """When a system first reached a level; None: it did not. clock: of CLOCKS."""
    for point in result["curve"]:
        if point["validation"] >= level:
            return point[f"{clock}_seconds"]
    return None


def groups_of(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by (log, split)."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["log"], result["split"]), []).append(result)
    return groups


def best_peer(group: list[Result]) -> Result | None:
    """The peer with the best validation; None without peers."""
    peers = [result for result in group if result["system"] not in OURS]
    return max(peers, key=best_of, default=None)


def progress(result: Result) -> str:
    """A line when a system is done."""
    last = result["curve"][-1]
    return (
        f"{result['log']}, {result['split']}, {result['system']}: "
        f"{len(result['curve'])} epochs in {last['wall_seconds']:.0f} s "
        f"({result['stopped']}), validation {best_of(result):.4f}, test {result['test']:.4f}"
    )


def table(record: dict) -> str:
    """A table for each log and split, a line a system."""
    parts = []
    for (log, split), group in groups_of(record["results"]).items():
        peer = best_peer(group)
        heading = f"{log}, {_TITLES[split]}"
        loads = [result["load_before"] for result in group]
        cores = sorted({result["cores"] for result in group})
        noun = "core" if cores == [1] else "cores"
        heading += (
            f" ({' or '.join(map(str, cores))} {noun}; load before a system was started "
            f"{min(loads):.1f} to {max(loads):.1f}):"
        )
        rows = [row(result, peer) for result in group]
        parts.append(f"{heading}\n\n{suite.markdown(rows)}")
    return "\n\n".join(parts)


def row(result: Result, peer: Result | None) -> dict[str, str]:
    """A system's line. peer: the best one."""
    cells = {
        "system": result["system"],
        "best NDCG@10": f"{best_of(result):.4f}",
        "test": f"{result['test']:.4f}",
        "best epoch": str(result["best_epoch"] + 1),
        "of": f"{len(result['curve'])} ({result['stopped']})",
        "s to 95 % of its own best: wall, training, CPU": shown(
            result, SHARE * best_of(result)
        ),
    }
    if peer is not None:
        level = SHARE * best_of(peer)
        cells |= {
            "s to 95 % of the best peer's": shown(result, level),
            "of the best peer's: wall, CPU": shares(result, peer, level),
        }
    cells |= {
        "interactions/s": f"{result['interactions_per_second']:,.0f}",
        "memory": f"{result['memory_bytes'] / 1e9:.1f} GB",
    }
    return cells


def shown(result: Result, level: float) -> str:
    """`seconds_to` by each clock, as a cell."""
    seconds = []
    for clock in CLOCKS:
        reached = seconds_to(result, level, clock)
        if reached is None:
            return "not reached"
        seconds.append(f"{reached:,.0f}")
    return " / ".join(seconds)


def shares(result: Result, peer: Result, level: float) -> str:
    """A system's time to a level by the peer's, which has reached it, as a cell."""
    parts = []
    for clock in ("wall", "cpu"):
        seconds = seconds_to(result, level, clock)
        of_peer = seconds_to(peer, level, clock)
        if seconds is None or of_peer is None:
            return ""
        parts.append(f"{seconds / of_peer:.2f}")
    return " / ".join(parts)


def chart(record: dict) -> str:
    """A panel for each log and split: NDCG@10 over wall time, a line a system."""
    panels = []
    for (log, split), group in groups_of(record["results"]).items():
        points = {}
        for result in group:
            points[result["system"]] = [
                (point["wall_seconds"], point["validation"])
                for point in result["curve"]
            ]
        marks = {}
        peer = best_peer(group)
        if peer is not None:
            marks["95 % of the best peer's best"] = SHARE * best_of(peer)
        panels.append(
            Curves(
                f"{log}, {_TITLES[split]}",
                points,
                "wall seconds, from the start of the process",
                f"validation {HEADLINE}",
                marks,
            )
        )
    return svg(panels)


if __name__ == "__main__":
    main()
