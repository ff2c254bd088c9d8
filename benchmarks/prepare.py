"""What does it take to prepare the logs of millions of users, and does it grow with them?

    python benchmarks/prepare.py                            0.12, 1.2 and 12 million users; 40 GB of disk, an hour
    python benchmarks/prepare.py --folder /scratch --keep   on another disk; logs and datasets stay there
    python benchmarks/prepare.py --short                    12 thousand users: does it run?

Synthetic logs of nine domains and a million items, 60 interactions a user on average (geometric), as Parquet files: written by
`launch/synthesize.py` and prepared by `launch/prepare.py`, each as the process that a person starts, imports included. Disk
caches are as the step before left them: the logs of the smaller sizes are in memory, those of the largest are not.

- memory: the sum of the resident sets of all processes of the command, at its peak, sampled 20 times a second; what they share
  counts for each. disk: most that lay in the output and beside it while it was prepared (sampled once a second), and the
  dataset in the end, all files.
- growth: seconds an interaction, as a multiple of those of the size before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.options import positive

ROOT = Path(__file__).resolve().parents[1]
USERS, SHORT = [120_000, 1_200_000, 12_000_000], [12_000]
DOMAINS, ITEMS, MEAN_LENGTH = 9, 1_000_000, 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", nargs="+", type=positive)
    parser.add_argument("--memory", default="8GB", help="what prepare.py is given (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where logs and datasets lie (default: that of temporary files)")
    parser.add_argument("--keep", action="store_true", help="leave logs and datasets; logs that are there are taken")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/prepare.json")
    options = parser.parse_args()
    users = options.users or (SHORT if options.short else USERS)
    facts = machine.describe(torch.device("cpu")) | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for count in users:
            results.append(measure(count, folder, options.memory, options.keep))
            record = assemble(options, facts, results)
            options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            show(Console(), record)


def measure(users, folder, memory, keep):
    """Writes and prepares the logs of so many users: a line of the JSON's `results`."""
    logs, data = folder / f"logs-{users}", folder / f"data-{users}"
    shutil.rmtree(data, ignore_errors=True)
    written = None
    if not (logs / "truth.json").is_file():
        size = ["--users", users, "--items", ITEMS, "--domains", DOMAINS, "--mean-length", MEAN_LENGTH]
        written = run(["launch/synthesize.py", "--output", logs, *size], logs)
    prepared = run(["launch/prepare.py", "--input", logs, "--output", data, "--memory", memory], data)
    dataset = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    result = {
        "users": users,
        "interactions": dataset["interactions"],
        "log_bytes": size_of(logs),
        "dataset_bytes": size_of(data),
        "shard_bytes": sum(shard["bytes"] for shard in dataset["shards"]),
        "memory_limit": memory,
        "synthesize": written,
        "prepare": prepared,
        "interactions_per_second": dataset["interactions"] / prepared["seconds"],
    }
    if not keep:
        shutil.rmtree(logs)
        shutil.rmtree(data)
    return result


def run(command, output):
    """Runs one of our scripts and watches it: seconds, and the most memory and disk that it took."""
    peak = {"memory": 0, "disk": 0}
    ended = threading.Event()
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

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
            peak["disk"] = max(peak["disk"], sum(size_of(path) for path in output.parent.glob(f"*{output.name}*")))

    watchers = [threading.Thread(target=watch) for watch in (watch_memory, watch_disk)]
    for watcher in watchers:
        watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    ended.set()
    for watcher in watchers:
        watcher.join()
    if status:
        sys.exit(f"error: {' '.join(map(str, command))} ended with status {status}")
    return {"seconds": seconds, "peak_memory_bytes": peak["memory"], "peak_disk_bytes": max(peak["disk"], size_of(output))}


def size_of(folder):
    """Bytes of all files below, of those that are still there."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue
    return total


def assemble(options, facts, results):
    """The JSON: every figure with what it was measured on."""
    return {
        "command": "python benchmarks/prepare.py " + " ".join(sys.argv[1:]),
        "settings": {"domains": DOMAINS, "items": ITEMS, "mean_length": MEAN_LENGTH, "memory": options.memory},
        "machine": facts,
        "results": results,
    }


def show(console, record):
    """The table, and below it what it was measured on."""
    title = f"Logs of nine domains, prepared with --memory {record['settings']['memory']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("users", "million rows", "logs GB", "written", "prepared", "rows/s", "growth", "memory", "disk", "dataset"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for result in record["results"]:
        prepared, written = result["prepare"], result["synthesize"]
        pace = prepared["seconds"] / result["interactions"]
        table.add_row(
            f"{result['users']:,}",
            f"{result['interactions'] / 1e6:,.1f}",
            f"{result['log_bytes'] / 1e9:.2f}",
            f"{written['seconds']:.1f} s" if written else "",
            f"{prepared['seconds']:.1f} s",
            f"{result['interactions_per_second'] / 1e6:.2f} M",
            f"{pace / before:.2f}" if before else "",
            f"{prepared['peak_memory_bytes'] / 1e9:.1f} GB",
            f"{prepared['peak_disk_bytes'] / 1e9:.2f} GB",
            f"{result['dataset_bytes'] / 1e9:.2f} GB",
        )
        before = pace
    console.print(table)
    facts = record["machine"]
    console.print(f"{facts['processor']}, {facts['cores']} cores; commit {facts['commit']}")
    if facts["load_before"] > 0.5:
        console.print(f"The load was {facts['load_before']:.1f} before the run: on a quiet machine the figures are others.")


if __name__ == "__main__":
    main()
