"""What does a checkpoint cost? Ours beside torch.distributed.checkpoint (DCP) and beside plain
copies of as many bytes.

    python benchmarks/checkpoint.py                  10⁶ and 10⁷ rows, 1 and 2 ranks: 14 GB disk and memory
    python benchmarks/checkpoint.py --short          10⁵ rows, one repeat
    python benchmarks/checkpoint.py folder=/scratch  on another disk than the one of temporary files

Rows of 64 floats with row-wise Adagrad (4 bytes a row), and a small dense model (D = 5, K = 5,
r = 64) with Adam. Each number of rows and of ranks is measured in processes of its own on this
machine; nothing trains meanwhile.

- ours: `trainer.checkpoint.save.Checkpoints`. What blocks training is `save`, a copy to the
  host; a thread writes it, flushes it, reads it again for the checksums of the manifest, and
  renames it. Loading is `newest` (reads all of it once, to compare the checksums) and then
  `restore_model` and `restore_optimizers`; building the engine is timed apart.
- DCP safetensors: `HuggingFaceStorageWriter(save_distributed=True)`. DCP pickle:
  `FileSystemWriter`, whose metadata is a pickle. Both flush their files too, keep no checksums,
  and are given the table and its optimizer's state alone. With `save` all of it blocks
  training; async is `async_save`, which copies first, as ours does.
- file copy: the limit of the disk. Ranks copy the files of our checkpoint, each its own ones,
  and flush them; for loading, they read them into memory that was touched before.
- memory copy: the limit of what blocks, the table's tensors copied to new memory.

Files come from the page cache where they were written just before. So each load is timed twice:
after the cache was asked to drop the files (`posix_fadvise`; from_disk says whether it did: on
tmpfs it does not), and right after that, from the cache. What lies below (a hypervisor, a
disk's own cache) may hold them still. Before each save dirty pages are written out (`sync`),
and what stood in the folder is removed. Times are those of the slowest rank. memory is what a
save takes beside what was there, at its peak, all ranks together.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.multiprocessing import ProcessExitedException

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, suite
from benchmarks.workload import dataset_of, draw, trainer_of
from syncrec.batch.build import build_batch
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from trainer.checkpoint.layout import RunState, list_checkpoints
from trainer.checkpoint.load import (
    find_newest,
    restore_model,
    restore_optimizers,
)
from trainer.checkpoint.save import Checkpoints
from trainer.config.load import flatten_config
from trainer.config.negatives import NegativesConfig
from trainer.distributed import process_group
from trainer.distributed.agreement import reduce_signals

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks
    from trainer.training.step import Trainer


DIM = 64
DOMAINS = 5
USERS = 32
SHORTEST = 16
LONGEST = 128
TRAINING = 600  # seconds of training between two checkpoints, as checkpoint.every_minutes has it
_COPIES_ON_DISK = 5  # ours, DCP's two formats, the plain copy, and the one that is being written


@dataclass(frozen=True)
class Settings:
    """settings/checkpoint.yaml. repeats: how often each is saved and loaded."""

    rows: list[int]
    ranks: list[int]
    repeats: int
    folder: str

    def __post_init__(self):
        suite.at_least(2 * DOMAINS, self, "rows")
        suite.at_least(1, self, "ranks", "repeats")
        suite.existing(self.folder)
        folder = self.folder or tempfile.gettempdir()
        rows = max(self.rows)
        needed = _COPIES_ON_DISK * (table_bytes(rows) + 2**24)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"folder {folder}: {rows} rows take {needed / 1e9:.1f} GB there for a "
                f"while, and {free / 1e9:.1f} GB are free: "
                "make room, or give a folder on another disk"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("checkpoint", Settings)
    record = suite.header("checkpoint", settings, options)
    record["machine"]["file_system"] = machine.file_system(
        Path(settings.folder or tempfile.gettempdir())
    )
    results = []
    not_run = []
    for rows in settings.rows:
        for ranks in settings.ranks:
            begin = time.perf_counter()
            try:
                with suite.scratch(settings.folder, "checkpoint-") as own:
                    results += suite.on_ranks(
                        ranks, measure, rows, settings.repeats, Path(own)
                    )
            except ProcessExitedException as error:
                reason = f"a rank's process ended ({error}), most likely for want of memory"
                not_run.append({"rows": rows, "ranks": ranks, "reason": reason})
                continue
            print(
                f"{rows:,} rows, ranks: {ranks} ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    suite.save(
        "checkpoint", record | {"results": results, "not_run": not_run}, options
    )
    sys.exit(bool(not_run))


def table_bytes(rows: int) -> int:
    """The weights and row-wise Adagrad's one number a row, float32."""
    return rows * (DIM + 1) * 4


def measure(rows: int, repeats: int, folder: Path) -> list[dict]:
    """`_measure` in the group of new processes."""
    with process_group.join_process_group() as ranks:
        return _measure(rows, repeats, ranks, folder)


def _measure(rows, repeats, ranks, folder):
    """Saves by every system in turn, as often as asked, then loads. Called on all ranks of a
    group; returns its lines.
    """
    trainer, _ = built(rows, ranks)
    for step in range(2):  # so that both optimizers have their state
        arrays = draw(
            trainer.dataset,
            step * ranks.world_size + ranks.rank,
            USERS,
            SHORTEST,
            LONGEST,
            trainer.config.negatives,
        )
        trainer.train_step(
            build_batch(
                *arrays,
                [domain.items for domain in trainer.dataset.domains],
                LONGEST,
            )
        )
    ours = Ours(trainer, folder)
    safetensors = (
        dcp.HuggingFaceStorageReader,
        lambda path: dcp.HuggingFaceStorageWriter(path, save_distributed=True),
    )
    pickle = dcp.FileSystemReader, dcp.FileSystemWriter
    systems = [
        ours,
        DCP("DCP safetensors", trainer, folder, *safetensors),
        DCPAsync("DCP safetensors async", trainer, folder, *safetensors),
        DCP("DCP pickle", trainer, folder, *pickle),
        DCPAsync("DCP pickle async", trainer, folder, *pickle),
        FileCopy(trainer, folder, ours),
        MemoryCopy(trainer, folder),
    ]
    saves = {system.name: [] for system in systems}
    for _ in range(
        repeats
    ):  # in turn: what else the machine does then meets all of them
        for system in systems:
            saves[system.name].append(timed_save(system))
    fresh, build_seconds = built(rows, ranks)
    loads = {system.name: [] for system in systems if system.loaded}
    for _ in range(repeats):
        for system in systems:
            if system.loaded:
                loads[system.name].append(timed_load(system, trainer, fresh))
    results = []
    for system in systems:
        line = {"system": system.name, "rows": rows, "ranks": ranks.world_size}
        line |= {
            "bytes": system.size,
            "table_bytes": table_bytes(rows),
            "files": system.files,
        }
        line["save"] = summary_of_saves(saves[system.name], system.size)
        line["load"] = (
            summary_of_loads(loads[system.name], system.size)
            if system.loaded
            else None
        )
        if system is ours:
            line["load"]["build_seconds"] = build_seconds
        results.append(line)
    return results


def built(rows: int, ranks: "Ranks") -> "tuple[Trainer, float]":
    """A trainer with a table of so many rows, and the seconds that this took."""
    model = ModelConfig(
        dim=DIM,
        max_length=LONGEST,
        experts=5,
        cross_experts=3,
        blocks=2,
        heads=1,
        ffn_dim=DIM,
        dropout=0.1,
        loss="bpr",
        time_knots=0,
        learn_scales=True,
    )
    dataset = replace(
        dataset_of(rows, DOMAINS, USERS * ranks.world_size, 2),
        streams=ranks.world_size,
    )
    negatives = NegativesConfig(shared=0)
    made = []
    (seconds,) = timed(
        lambda: made.append(
            trainer_of(model, USERS, dataset, ranks, negatives=negatives)
        )
    )
    return made[0], seconds


class System:
    """A way to keep a trainer's state. What it does is a list of actions, each timed from the
    start of the first.
    """

    name: str
    # False: there is nothing to load, or another system's files are the same.
    loaded = True
    # Of the last save, in bytes.
    size = 0
    files: ClassVar[dict[str, int]] = {}

    def __init__(self, trainer: "Trainer", folder: Path):
        self.trainer = trainer
        self.folder = folder / self.name.replace(" ", "-")

    def saving(self) -> list[Callable]:
        """The first action is what blocks training."""
        raise NotImplementedError

    def loading(self, fresh: "Trainer") -> list[Callable]:
        """Into `fresh`, a Trainer; None: it loads into nothing."""
        raise NotImplementedError

    def written(self) -> Path | None:
        """The folder with the files of the last save, None where there is none."""
        return self.folder


class Ours(System):
    """The trainer's own checkpoints."""

    name = "ours"

    def __init__(self, trainer: "Trainer", folder: Path):
        super().__init__(trainer, folder)
        facts = {
            "config": flatten_config(trainer.config),
            "dataset": trainer.dataset.fingerprint,
        }
        self._checkpoints = Checkpoints(self.folder, 1, trainer.ranks, facts)
        self._state = RunState(trainer.step)

    def saving(self):
        self._state.step += (
            1  # the state that was saved last is not saved again
        )
        return [
            lambda: self._checkpoints.save(
                self.trainer.engine, self.trainer.table, self._state
            ),
            self._checkpoints.finish,
        ]

    def loading(self, fresh: "Trainer"):
        model = SyNCRec(
            fresh.config.model, len(fresh.dataset.domains)
        )  # restored before an engine is built around it
        found = []

        def restore():
            restore_model(found[0], model)
            restore_optimizers(found[0], fresh.engine, fresh.table)

        return [
            lambda: found.extend(find_newest(self.folder, fresh.ranks, print)),
            restore,
        ]

    def written(self):
        return list_checkpoints(self.folder)[0]


class DCP(System):
    """torch.distributed.checkpoint in the foreground."""

    def __init__(
        self,
        name: str,
        trainer: "Trainer",
        folder: Path,
        reader: Callable,
        writer: Callable,
    ):
        self.name = name
        self._reader = reader
        self._writer = writer
        super().__init__(trainer, folder)

    def saving(self):
        state = table_state(self.trainer.table)
        writer = self._writer(str(self.folder))
        return [lambda: dcp.save(state, storage_writer=writer)]

    def loading(self, fresh: "Trainer"):
        state = table_state(fresh.table)
        reader = self._reader(str(self.folder))
        return [lambda: dcp.load(state, storage_reader=reader)]


class DCPAsync(DCP):
    """torch.distributed.checkpoint with a thread that writes; the files are those of the
    foreground.
    """

    loaded = False

    def saving(self):
        state = table_state(self.trainer.table)
        writer = self._writer(str(self.folder))
        futures = []
        return [
            lambda: futures.append(
                dcp.async_save(state, storage_writer=writer)
            ),
            lambda: futures.pop().result(),
        ]


class FileCopy(System):
    """Our checkpoint's files copied, and the copies read; the ranks share the files."""

    name = "file copy"

    def __init__(self, trainer: "Trainer", folder: Path, ours: Ours):
        super().__init__(trainer, folder)
        self._ours = ours

    def saving(self):
        self.folder.mkdir(exist_ok=True)
        sources = self._share(self._ours.written())

        def copy():
            for source in sources:
                shutil.copyfile(source, self.folder / source.name)
                flush(self.folder / source.name)

        return [copy]

    def loading(self, fresh: "Trainer"):
        files = self._share(self.folder)
        memory = [
            torch.ones(file.stat().st_size, dtype=torch.uint8).numpy()
            for file in files
        ]

        def read():
            for file, values in zip(files, memory, strict=True):
                with open(file, "rb", buffering=0) as stream:
                    done = 0
                    while count := stream.readinto(
                        values[done:]
                    ):  # Linux reads 2 GiB at once at most
                        done += count

        return [read]

    def _share(self, folder):
        """Every ranks-th file: the table's files, one a rank, stand together at the end of the
        names.
        """
        ranks = self.trainer.ranks
        return sorted(folder.iterdir())[ranks.rank :: ranks.world_size]


class MemoryCopy(System):
    """The table's tensors copied to new memory."""

    name = "memory copy"
    loaded = False

    def saving(self):
        tensors = self.trainer.table.shard()[1].values()
        return [lambda: [tensor.to("cpu", copy=True) for tensor in tensors]]

    def written(self):
        return None


def table_state(table: "ItemTable") -> dict:
    """The table as DCP takes it: TorchRec's ShardedTensors of the weights and of the fused
    optimizer's state.
    """
    (state,) = table._parallel.fused_optimizer.state_dict()["state"].values()
    return dict(table._collection.state_dict()) | state


def timed_save(system: System) -> tuple:
    """Seconds that block, seconds in all, and bytes of memory on all ranks (None where the
    system does not tell) of a save.
    """
    ranks = system.trainer.ranks
    if ranks.first:
        shutil.rmtree(system.folder, ignore_errors=True)
        os.sync()
    reduce_signals()
    actions = system.saving()
    before = machine.reset_peak_memory()
    laps = timed(*actions)
    taken = torch.tensor(
        [-1 if before is None else machine.peak_memory() - before]
    )
    dist.all_reduce(taken)
    folder = system.written()
    system.files = (
        {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        if folder
        else {}
    )
    system.size = (
        sum(system.files.values())
        if folder
        else table_bytes(system.trainer.table.rows)
    )
    reduce_signals()
    if not system.loaded and ranks.first:
        shutil.rmtree(system.folder, ignore_errors=True)
    return laps[0], laps[-1], None if before is None else int(taken)


def timed_load(system: System, trainer: "Trainer", fresh: "Trainer") -> dict:
    """Loads from the disk and again from the page cache: {"from_disk": …, "disk": (seconds of
    each action), "cached": …}.

    Raises ArithmeticError where `fresh` does not get the table that `trainer` has.
    """
    kept = trainer.table.shard()[1]
    filled = fresh.table.shard()[1]
    load = {}
    for place in ("disk", "cached"):
        for tensor in filled.values():
            tensor.zero_()
        actions = system.loading(fresh)
        if place == "disk":
            reduce_signals()
            load["from_disk"] = (
                machine.drop_from_cache(system.written().iterdir())
                if fresh.ranks.first
                else None
            )
        load[place] = timed(*actions)
        if not isinstance(system, FileCopy) and not all(
            torch.equal(kept[name], filled[name]) for name in kept
        ):
            raise ArithmeticError(
                f"{system.name} loads another table than it saved"
            )
    return load


def timed(*actions: Callable[[], Any]) -> list[float]:
    """Seconds from a start that all ranks share until the end of each action, on the slowest
    rank. Called on all ranks.
    """
    reduce_signals()
    begin = time.perf_counter()
    laps = []
    for action in actions:
        action()
        laps.append(time.perf_counter() - begin)
    slowest = torch.tensor(laps, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def flush(file: Path) -> None:
    """To disk."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def summary_of_saves(saves: list[tuple], size: int) -> dict:
    """What the JSON says of a system's saves. saves: what `timed_save` gave."""
    blocking, seconds, memory = zip(*saves, strict=True)
    median = statistics.median(blocking)
    return {
        "blocking_seconds": suite.spread(blocking),
        "blocking_share": median / TRAINING,
        "seconds": suite.spread(seconds),
        "bytes_per_second": size / statistics.median(seconds),
        "memory_bytes": None if None in memory else max(memory),
    }


def summary_of_loads(loads: list[dict], size: int) -> dict:
    """What the JSON says of a system's loads. loads: what `timed_load` gave."""
    summary = {"from_disk": all(load["from_disk"] for load in loads)}
    for place in ("disk", "cached"):
        seconds = [load[place][-1] for load in loads]
        summary[place] = {
            "seconds": suite.spread(seconds),
            "bytes_per_second": size / statistics.median(seconds),
        }
        if len(loads[0][place]) > 1:
            summary[place]["verify_seconds"] = suite.spread(
                [load[place][0] for load in loads]
            )
    return summary


def table(record: dict) -> str:
    """A line for each size and number of ranks: ours, as a share of what the copies reach, and
    DCP's times.
    """
    groups = {}
    rows = []
    notes = []
    for line in record["results"]:
        groups.setdefault((line["rows"], line["ranks"]), {})[line["system"]] = (
            line
        )
    for (count, ranks), of in groups.items():
        ours = of["ours"]
        copy = of["file copy"]
        save = ours["save"]
        load = ours["load"]
        blocks = save["blocking_seconds"]["median"]
        memory_copy = of["memory copy"]["save"]["blocking_seconds"]["median"]
        total = save["seconds"]["median"]
        written = ours["bytes"] / (total - blocks)
        read = load["disk"]["bytes_per_second"]
        row = {
            "rows": f"{count:,}",
            "ranks": ranks,
            "size": f"{ours['bytes'] / 1e6:,.0f} MB",
            "blocks s (min – max)": suite.shown(save["blocking_seconds"], 2),
            f"share of {TRAINING} s": f"{save['blocking_share']:.2%}",
            "of memory copy": f"{memory_copy / blocks:.0%}",
            "total s (min – max)": suite.shown(save["seconds"], 2),
            "written after the copy": f"{written / 1e6:,.0f} MB/s",
            "of file copy": f"{written / copy['save']['bytes_per_second']:.0%}",
            "load from disk": f"{read / 1e6:,.0f} MB/s",
            "of file read": f"{read / copy['load']['disk']['bytes_per_second']:.0%}",
            "memory": ""
            if save["memory_bytes"] is None
            else f"{save['memory_bytes'] / 1e6:,.0f} MB",
        }
        for name in ("DCP safetensors", "DCP pickle"):
            seconds = (
                of[name]["save"]["seconds"]["median"],
                of[name]["load"]["disk"]["seconds"]["median"],
            )
            row[f"{name}: save, load"] = (
                f"{seconds[0]:.2f} s, {seconds[1]:.2f} s"
            )
        rows.append(row)
        if not all(
            line["load"]["from_disk"] for line in of.values() if line["load"]
        ):
            notes.append(
                f"{count:,} rows, ranks: {ranks}: not all files had left the page cache "
                "before loading from disk."
            )
    for left_out in record["not_run"]:
        notes.append(
            f"{left_out['rows']:,} rows, ranks: {left_out['ranks']}, not run: {left_out['reason']}."
        )
    if record["machine"]["file_system"] in ("tmpfs", "ramfs"):
        notes.append("These files lay in memory: give folder=… on a disk.")
    return "\n\n".join([suite.markdown(rows), *notes])


if __name__ == "__main__":
    main()
