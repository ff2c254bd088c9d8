"""What all benchmarks share: settings from YAML, processes of their own, the record, and its
tables.

A benchmark is `benchmarks/NAME.py`. Its docstring says what it asks and how it measures, a
frozen dataclass holds its settings (`settings/NAME.yaml`), `main()` measures and saves, and
`table(record)` makes Markdown of what was saved, and nothing else:

    @dataclass(frozen=True)
    class Settings:
        items: list[int]
        def __post_init__(self):
            at_least(1, self, "items")

    def main():
        settings, options = suite.settings("NAME", Settings)
        # Before anything is measured: it notes the load.
        record = suite.header("NAME", settings, options)
        results = []
        for items in settings.items:
            results.append(suite.in_own_process(measure, settings, items))
        suite.save("NAME", record | {"results": results}, options)

    def table(record):
        rows = []
        for result in record["results"]:
            seconds = shown(result["seconds"])
            rows.append({"items": f"{result['items']:,}", "s": seconds})
        return markdown(rows)

The command line of each is `python benchmarks/NAME.py [--short] [--json FILE] [key=value …]`.
With --short the YAML's `short` is laid over its `full`. A full run writes results/NAME.json; a
short one only prints, unless --json says where to: `make bench` has it overwrite
results/NAME.json. `tables.py` puts what lies there into README.md.
"""

import argparse
import importlib
import json
import os
import socket
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import spawn

from benchmarks import machine
from trainer.files.atomic import write_json

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
_SHOWN = (
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "deepspeed",
)  # packages that a table's caption names


@dataclass(frozen=True)
class Options:
    """How a benchmark was started. json: where the record goes, None: nowhere. given: the
    `key=value`s.
    """

    short: bool
    json: Path | None
    given: tuple[str, ...] = ()


def settings(
    name: str, kind: type, arguments: list[str] | None = None
) -> tuple[Any, Options]:
    """`kind` filled from settings/NAME.yaml and the command line, and the Options. A bad value
    is one line, exit status 2.
    """
    about = sys.modules[kind.__module__].__doc__
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="key=value",
        help=f"over benchmarks/settings/{name}.yaml",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="the short form: does it run? It only prints, unless --json is given",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help=f"where the record goes (benchmarks/results/{name}.json)",
    )
    options = parser.parse_intermixed_args(arguments)
    described = OmegaConf.load(FOLDER / "settings" / f"{name}.yaml")
    try:
        form = [described.full] + [described.short] * options.short
        filled = OmegaConf.to_object(
            OmegaConf.merge(
                OmegaConf.structured(kind),
                *form,
                OmegaConf.from_dotlist(options.given),
            )
        )
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        parser.error((f"{key}: " if key else "") + str(error).splitlines()[0])
    if options.json is None and not options.short:
        options.json = RESULTS / f"{name}.json"
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(
            f"--json {options.json}: there is no folder {options.json.resolve().parent}"
        )
    return filled, Options(options.short, options.json, tuple(options.given))


def at_least(least: float, settings: Any, *names: str) -> None:
    """Raises ValueError where one of these settings, or an entry of a list, is less, or where a
    list is empty.
    """
    for name in names:
        value = getattr(settings, name)
        if (
            min(
                value if isinstance(value, list) else [value], default=least - 1
            )
            < least
        ):
            raise ValueError(f"{name} is {value}: give at least {least}")


def scratch(
    folder: str, prefix: str = "benchmark-"
) -> tempfile.TemporaryDirectory:
    """A new temporary folder in `folder` ("": the system's place), removed at the end of its
    `with`.
    """
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder or None)


def existing(folder: str) -> None:
    """Raises ValueError where there is no such folder ("" is the system's place for temporary
    files).
    """
    if folder and not Path(folder).is_dir():
        raise ValueError(f"folder {folder}: there is no such folder")


def once(file: Path, task: Any, function: Callable[[], Any]) -> Any:
    """`function()`, or what it returned in an earlier call with the same task, which `file` keeps.

    Both are plain values that JSON holds.
    """
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["task"] == task:
            return kept["answer"]
    answer = function()
    write_json(file, {"task": task, "answer": answer})
    return answer


def device() -> torch.device:
    """What is measured on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def header(name: str, settings: Any, options: Options) -> dict:
    """A record's first part: what was asked for, when, and on what. No folder of this machine
    is in it.
    """
    command = [
        "python",
        f"benchmarks/{name}.py",
        *["--short"] * options.short,
        *map(_without_folder, options.given),
    ]
    return {
        "benchmark": name,
        "form": "short" if options.short else "full",
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            key: _without_folder(value)
            for key, value in asdict(settings).items()
        },
        "machine": machine.describe(device()),
    }


def _without_folder(value):
    """`a=/x/y` becomes `a=y`, in lists and dictionaries too."""
    if isinstance(value, list):
        return [_without_folder(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_folder(entry) for key, entry in value.items()}
    if not isinstance(value, str) or os.sep not in value:
        return value
    key, equals, path = value.rpartition("=")
    return key + equals + Path(path).name


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a new process; see `on_ranks`."""
    return on_ranks(1, function, *arguments)


def on_ranks(ranks: int, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in so many new local processes, whose environment describes their
    group (`distributed.joined`); returns what the first one returned, which has to be plain
    values that JSON holds.

    Raises torch.multiprocessing.ProcessExitedException where one of them is killed.
    """
    with socket.socket() as probe:  # a port that nobody listens on now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as own:
        answer = Path(own) / "answer.json"
        group = spawn(
            _rank,
            (ranks, port, answer, function, arguments),
            nprocs=ranks,
            join=False,
        )
        try:
            while not group.join():  # True once all have ended
                pass
        finally:  # whatever ends this, nobody goes on writing
            for process in group.processes:
                process.kill()
                process.join()
        return json.loads(answer.read_text())


def _rank(rank, ranks, port, answer, function, arguments):
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
    }
    os.environ.update(
        {name: str(value) for name, value in place.items()},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # torch calls what it has deprecated
    returned = function(*arguments)
    if rank == 0:
        write_json(answer, returned)
    sys.stdout.flush()
    os._exit(
        0
    )  # without Python's teardown: trainer.distributed.process_exit says why


def spread(values: list[float]) -> dict:
    """Median, extremes, and all of them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def save(name: str, record: dict, options: Options) -> None:
    """Prints the record's tables and writes it, whole or not at all, where `options` say."""
    print(render(name, record), flush=True)
    if options.json:
        write_json(options.json, record)
        print(f"written: {options.json}")


def render(name: str, record: dict) -> str:
    """A record as README.md has it: what it was measured on, and the benchmark's own `table`."""
    benchmark = importlib.import_module(f"benchmarks.{name}")
    table = benchmark.table(record).strip()
    return f"{caption(record)}\n\n{table}"


def caption(record: dict) -> str:
    """One line: short or full form, date, hardware, versions, commit, load."""
    facts = record["machine"]
    versions = [
        f"{package} {facts['versions'][package]}"
        for package in _SHOWN
        if package in facts["versions"]
    ]
    device = [] if facts["device"] == "cpu" else [facts["device"]]
    hardware = [
        *device,
        facts["processor"],
        f"{facts['cores']} cores",
        f"{facts['memory_bytes'] / 1e9:.0f} GB",
    ]
    hardware += [facts["file_system"]] if "file_system" in facts else []
    commit = (facts["commit"] or "unknown")[:8] + (
        " with uncommitted changes" if facts["uncommitted_changes"] else ""
    )
    quiet = (
        ""
        if facts["load_before"] <= 0.5
        else ": on a quiet machine the figures are others"
    )
    form = (
        "Short form (does it run? not for comparison)"
        if record["form"] == "short"
        else "Full form"
    )
    return (
        f"*{form}, {record['date'][:10]}. {', '.join(hardware)}. Python {facts['python']}, "
        f"{', '.join(versions)}. "
        f"Commit {commit}. Load before the run {facts['load_before']:.1f}{quiet}.*"
    )


def markdown(rows: list[dict]) -> str:
    """A Markdown table of [{column: cell}, …], the first column to the left, the others to the
    right; "" for no rows.
    """
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        columns,
        *([str(row.get(column, "")) for column in columns] for row in rows),
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def line(cells):
        padded = [
            cells[0].ljust(widths[0]),
            *(
                cell.rjust(width)
                for cell, width in zip(cells[1:], widths[1:], strict=True)
            ),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|"
        + "|".join(
            [
                "-" * (widths[0] + 2),
                *("-" * (width + 1) + ":" for width in widths[1:]),
            ]
        )
        + "|"
    )
    return "\n".join([line(columns), rule, *map(line, lines[1:])])


def shown(timing: dict, digits: int = 3) -> str:
    """A `spread` as a table's cell: median (min – max)."""
    return (
        f"{timing['median']:.{digits}f} ({timing['min']:.{digits}f} – "
        f"{timing['max']:.{digits}f})"
    )
