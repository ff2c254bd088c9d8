"""What does it take to prepare the logs of millions of users, and does it grow with them?

    python benchmarks/prepare.py                            0.12, 1.2 and 12 million users; 40 GB, an hour
    python benchmarks/prepare.py folder=/scratch keep=true  elsewhere; logs and datasets stay there
    python benchmarks/prepare.py --short                    12 thousand users: does it run?

Synthetic logs of nine domains and a million items, 60 interactions a user on average
(geometric), as Parquet files: written by `launch/synthesize.py` and prepared by
`launch/prepare.py`, each as the process that a person starts, imports included. Disk caches are
as the step before left them: the logs of the smaller sizes are in memory, those of the largest
are not.

- memory: the sum of the resident sets of all processes of the command, at its peak, sampled 20
  times a second; what they share counts for each. disk: most that lay in the output and beside
  it while it was prepared (sampled once a second), and the dataset in the end, all files.
- growth: seconds an interaction, as a multiple of those of the size before.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, suite

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """settings/prepare.yaml."""

    users: list[int]
    items: int
    domains: int
    mean_length: int
    memory: str
    folder: str
    keep: bool

    def __post_init__(self):
        suite.at_least(1, self, "users", "items", "domains", "mean_length")
        suite.existing(self.folder)
        if self.keep and not self.folder:
            raise ValueError(
                "keep is true: give the folder=… that logs and datasets are left in"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("prepare", Settings)
    record = suite.header("prepare", settings, options) | {"results": []}
    with suite.scratch(settings.folder, "prepare-") as temporary:
        folder = Path(settings.folder if settings.keep else temporary)
        record["machine"]["file_system"] = machine.file_system(folder)
        for users in settings.users:
            record["results"].append(measure(users, settings, folder))
            suite.save("prepare", record, options)


def measure(users: int, settings: Settings, folder: Path) -> dict:
    """Writes and prepares the logs of so many users: an entry of the record's `results`."""
    logs = folder / f"logs-{users}"
    data = folder / f"data-{users}"
    shutil.rmtree(data, ignore_errors=True)
    written = None
    if not (logs / "_truth.json").is_file():
        size = [
            "--users",
            users,
            "--items",
            settings.items,
            "--domains",
            settings.domains,
        ]
        size += ["--mean-length", settings.mean_length]
        written = run(["launch/synthesize.py", "--output", logs, *size], logs)
    prepared = run(
        [
            "launch/prepare.py",
            "--input",
            logs,
            "--output",
            data,
            "--memory",
            settings.memory,
        ],
        data,
    )
    dataset = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    result = {
        "users": users,
        "interactions": dataset["interactions"],
        "log_bytes": size_of(logs),
        "dataset_bytes": size_of(data),
        "shard_bytes": sum(shard["bytes"] for shard in dataset["shards"]),
        "synthesize": written,
        "prepare": prepared,
        "interactions_per_second": dataset["interactions"]
        / prepared["seconds"],
    }
    if not settings.keep:
        shutil.rmtree(logs)
        shutil.rmtree(data)
    return result


def run(command: list[str], output: Path) -> dict:
    """Runs one of our scripts and watches it: seconds, and the most memory and disk that it
    took.
    """
    peak = {"memory": 0, "disk": 0}
    ended = threading.Event()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    def watch_memory():
        root = psutil.Process(process.pid)
        while not ended.wait(0.05):
            total = 0
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                break
            for member in family:
                try:
                    total += member.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            peak["memory"] = max(peak["memory"], total)

    def watch_disk():
        while not ended.wait(1):
            peak["disk"] = max(
                peak["disk"],
                sum(
                    size_of(path)
                    for path in output.parent.glob(f"*{output.name}*")
                ),
            )

    watchers = [
        threading.Thread(target=watch) for watch in (watch_memory, watch_disk)
    ]
    for watcher in watchers:
        watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    ended.set()
    for watcher in watchers:
        watcher.join()
    if status:
        sys.exit(
            f"error: {' '.join(map(str, command))} ended with status {status}"
        )
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak["memory"],
        "peak_disk_bytes": max(peak["disk"], size_of(output)),
    }


def size_of(folder: Path) -> int:
    """Bytes of all files below, of those that are still there."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue
    return total


def table(record: dict) -> str:
    """A line for each number of users."""
    rows = []
    before = None
    for result in record["results"]:
        prepared = result["prepare"]
        written = result["synthesize"]
        pace = prepared["seconds"] / result["interactions"]
        rows.append(
            {
                "users": f"{result['users']:,}",
                "interactions": f"{result['interactions'] / 1e6:,.1f} million",
                "logs": f"{result['log_bytes'] / 1e9:.2f} GB",
                "written in": f"{written['seconds']:.1f} s" if written else "",
                "prepared in": f"{prepared['seconds']:.1f} s",
                "interactions/s": f"{result['interactions_per_second'] / 1e6:.2f} million",
                "time per interaction, against the size before": f"{pace / before:.2f}"
                if before
                else "",
                "memory": f"{prepared['peak_memory_bytes'] / 1e9:.1f} GB",
                "disk": f"{prepared['peak_disk_bytes'] / 1e9:.2f} GB",
                "dataset": f"{result['dataset_bytes'] / 1e9:.2f} GB",
            }
        )
        before = pace
    return suite.markdown(rows)


if __name__ == "__main__":
    main()
