"""What does a table take of devices and hosts, and what is read to resume, to begin warm, and
to publish?

    python benchmarks/host_memory.py                              8 ranks a host, 64 and 512 ranks
    python benchmarks/host_memory.py rows=[50000000] dim=256 ranks_a_host=4

Everything but the last table is reckoned, by the functions that a run plans with, for the sizes in
settings/host_memory.yaml; no rank is started.

- plan: bytes of the rows and their optimizer's state on a rank's device and on the host, of a
  checkpoint while it is written, and of the loaders, those of all ranks of a host together.
  Training goes on while a checkpoint is written where the host has room for a copy of the rows;
  otherwise it waits, and a piece of the rows is held at a time.
- resume, warm start: files that are opened and bytes that are read, by all ranks together.
  `before`: each rank opens every file of the table (and in a warm start reads every block with
  any row of its own, which is all of them where rows have moved). `now`:
  `embeddings.checkpoint.load_shard` and `embeddings.warm_start.carry_rows`. "other": one rank
  less than wrote the files.
- publish: tables that a rank holds at most, and their bytes. `before`: TorchRec's modules refer
  to themselves in circles, so that a model that was let go stayed until Python collected it.
- measured: a table made in a process of its own, in bytes that it adds to what is resident.
"""

import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from benchmarks.workload import dataset_of
from embeddings.checkpoint import ShardCopy, find_table_files
from embeddings.config import TableConfig
from embeddings.placement import HostNeeds, Room, plan_capacity
from embeddings.table import ItemTable
from trainer.config.run import RunConfig
from trainer.config.stream import StreamConfig
from trainer.distributed import process_group
from trainer.training.loader_memory import estimate_loader_bytes

# that publishing held at once: of the candidate, the current model, and one that was being made
_TABLES_BEFORE = 3


@dataclass(frozen=True)
class Settings:
    """settings/host_memory.yaml."""

    rows: list[int]
    dim: int
    optimizer: str
    ranks_a_host: int
    host_bytes: int
    device_bytes: int
    users: int
    length: int
    workers: int
    ranks: list[int]
    measured_rows: int

    def __post_init__(self):
        suite.at_least(
            1,
            self,
            "rows",
            "dim",
            "ranks_a_host",
            "host_bytes",
            "device_bytes",
            "users",
            "length",
        )
        suite.at_least(2, self, "ranks")
        suite.at_least(0, self, "workers")
        suite.at_least(20_000, self, "measured_rows")


def main() -> None:
    settings, options = suite.settings("host_memory", Settings)
    record = suite.header("host_memory", settings, options)
    record["plans"] = [
        plan(settings, rows, device)
        for rows in settings.rows
        for device in (True, False)
    ]
    record["reads"] = [
        reads(settings, rows, ranks)
        for rows in settings.rows
        for ranks in settings.ranks
    ]
    record["measured"] = suite.in_own_process(measure, settings)
    suite.save("host_memory", record, options)


def plan(settings: Settings, rows: int, device: bool) -> dict:
    """Of a rank with so many rows, and of its host. device: the rank has a device."""
    room = Room(
        settings.device_bytes if device else None,
        settings.host_bytes // settings.ranks_a_host,
    )
    found = {"rows": rows, "device": device}
    try:
        needs = HostNeeds(checkpoints=True, loaders=loaders_of(settings))
        capacity = plan_capacity(
            TableConfig(), settings.optimizer, rows, settings.dim, room, needs
        )
    except ValueError as error:
        return found | {"refused": str(error)}
    host = settings.ranks_a_host
    return found | {
        "device_bytes": capacity.device,
        "host_rows": host * capacity.host,
        "host_checkpoint": host * capacity.checkpoint,
        "host_loaders": host * needs.loaders,
        "copied": capacity.copied,
    }


def loaders_of(settings: Settings) -> int:
    """Bytes of a rank's loaders."""
    users = 1_000_000
    dataset = dataset_of(1000, 5, users, 1)
    dataset = type(dataset)(
        **{**vars(dataset), "interactions": users * settings.length}
    )
    config = RunConfig(
        global_batch_size=settings.users,
        stream=StreamConfig(workers=settings.workers),
    )
    return estimate_loader_bytes(config, dataset, 1)


def reads(settings: Settings, rows: int, ranks: int) -> dict:
    """Of all ranks together, of a table with so many rows a rank."""
    total = rows * ranks
    row = plan_capacity(
        TableConfig(), settings.optimizer, 1, settings.dim, Room(None, 10**9)
    ).host
    ranges = {f"table-{rank:05d}": (rank * rows, rows) for rank in range(ranks)}
    found = {
        "rows": rows,
        "ranks": ranks,
        "table_bytes": total * row,
        "publish_before": _TABLES_BEFORE,
        "publish_now": 1,
    }
    for name, others in (("same", ranks), ("other", ranks - 1)):
        share = -(-total // others)
        opened = sum(
            len(
                find_table_files(
                    Path(), ranges, rank * share, min(total, (rank + 1) * share)
                )
            )
            for rank in range(others)
        )
        # A warm start looks into each file's header once, and reads by the same ranges.
        found[name] = {
            "resume_before": others * ranks,
            "resume_now": opened,
            "warm_before": others * ranks,
            "warm_now": ranks + opened,
        }
    found |= {
        "warm_bytes_before": ranks * total * row,
        "warm_bytes_now": total * row,
    }
    return found


def measure(settings: Settings) -> dict:
    """Bytes that a table adds to what is resident: made without rows, filled, and with a
    checkpoint's copy.
    """
    with process_group.join_process_group():
        gc.collect()
        begun = _resident()
        table = ItemTable(
            settings.measured_rows,
            settings.dim,
            TableConfig(optimizer="sgd"),
            0,
            "cpu",
            filled=False,
        )
        made = _resident()
        table.fill()
        filled = _resident()
        copy = ShardCopy(table)
        copied = _resident()
        del copy
        return {
            "rows": settings.measured_rows,
            "bytes": table.capacity.host,
            "made": made - begun,
            "filled": filled - begun,
            "copied": copied - begun,
            "copy_gone": _resident() - begun,
        }


def _resident():
    return 1024 * int(
        re.search(
            r"^Rss: +(\d+) kB",
            Path("/proc/self/smaps_rollup").read_text(),
            re.MULTILINE,
        )[1]
    )


def table(record: dict) -> str:
    """What a rank and a host take; what is read; what was measured."""
    planned = [_planned(result) for result in record["plans"]]
    read = [_read(result) for result in record["reads"]]
    measured = record["measured"]
    line = {
        f"{name.replace('_', ' ')}, MB": f"{measured[name] / 1e6:.0f}"
        for name in ("bytes", "made", "filled", "copied")
    }
    line = (
        {"rows": f"{measured['rows']:,}"}
        | line
        | {"copy gone, MB": f"{measured['copy_gone'] / 1e6:.0f}"}
    )
    return "\n\n".join(suite.markdown(rows) for rows in (planned, read, [line]))


def _planned(result):
    line = {
        "rows a rank": f"{result['rows']:,}",
        "on": "GPU" if result["device"] else "CPU",
    }
    if "refused" in result:
        return line | {"training while it is written": "refused"}
    return line | {
        "device, GB": f"{result['device_bytes'] / 1e9:.1f}",
        "host: rows, GB": f"{result['host_rows'] / 1e9:.1f}",
        "checkpoint, GB": f"{result['host_checkpoint'] / 1e9:.1f}",
        "loaders, GB": f"{result['host_loaders'] / 1e9:.1f}",
        "training while it is written": "goes on"
        if result["copied"]
        else "waits",
    }


def _read(result):
    line = {
        "rows a rank": f"{result['rows']:,}",
        "ranks": result["ranks"],
        "table, TB": f"{result['table_bytes'] / 1e12:.2f}",
    }
    for name, shown in (
        ("resume", "resume: files"),
        ("warm", "warm start: files"),
    ):
        for when in ("before", "now"):
            line[f"{shown}, {when}"] = f"{result['same'][f'{name}_{when}']:,}"
    line["one rank less, now"] = f"{result['other']['resume_now']:,}"
    for when in ("before", "now"):
        line[f"warm start: TB, {when}"] = (
            f"{result[f'warm_bytes_{when}'] / 1e12:.2f}"
        )
    for when in ("before", "now"):
        of_rank = (
            result[f"publish_{when}"] * result["table_bytes"] / result["ranks"]
        )
        line[f"publish: GB a rank, {when}"] = f"{of_rank / 1e9:.1f}"
    return line


if __name__ == "__main__":
    main()
