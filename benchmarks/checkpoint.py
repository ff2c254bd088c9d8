"""What does a checkpoint cost? Ours beside torch.distributed.checkpoint (DCP) and beside plain copies of as many bytes.

    python benchmarks/checkpoint.py                     10⁶ and 10⁷ rows, 1 and 2 ranks: 14 GB of disk and of memory
    python benchmarks/checkpoint.py --short             10⁵ rows, one repeat
    python benchmarks/checkpoint.py --folder /scratch   on another disk than the one of temporary files

Rows of 64 floats with row-wise Adagrad (4 bytes a row), and a small dense model (D = 5, K = 5, r = 64) with Adam. Each number
of rows and of ranks is measured in processes of its own on this machine; nothing trains meanwhile.

- ours: `trainer.checkpoint.Checkpoints`. What blocks training is `save`, a copy to the host; a thread writes it, flushes it,
  reads it again for the checksums of the manifest, and renames it. Loading is `newest` (reads all of it once, to compare the
  checksums) and then `restore_model` and `restore_optimizers`; building the engine is timed apart.
- DCP safetensors: `HuggingFaceStorageWriter(save_distributed=True)`. DCP pickle: `FileSystemWriter`, whose metadata is a
  pickle. Both flush their files too, keep no checksums, and are given the table and its optimizer's state alone. With `save`
  all of it blocks training; async is `async_save`, which copies first, as ours does.
- file copy: the limit of the disk. Ranks copy the files of our checkpoint, each its own ones, and flush them; for loading,
  they read them into memory that was touched before.
- memory copy: the limit of what blocks, the table's tensors copied to new memory.

Files come from the page cache where they were written just before. So each load is timed twice: after the cache was asked to
drop the files (`posix_fadvise`; from_disk says whether it did: on tmpfs it does not), and right after that, from the cache.
What lies below (a hypervisor, a disk's own cache) may hold them still. Before each save dirty pages are written out (`sync`),
and what stood in the folder is removed. Times are those of the slowest rank. memory is what a save takes beside what was
there, at its peak, all ranks together.
"""

import argparse
import ctypes
import importlib.metadata
import json
import mmap
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich import box
from rich.console import Console
from rich.table import Table
from torch.multiprocessing import ProcessExitedException, spawn

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.options import positive
from benchmarks.workload import dataset_of, draw
from syncrec.batch import build_batch
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from trainer import distributed
from trainer.checkpoint import Checkpoints, RunState, checkpoints, newest, restore_model, restore_optimizers, write_json
from trainer.config import RunConfig, flat
from trainer.control import agree
from trainer.data.stream import Plan
from trainer.step import Trainer

DIM, DOMAINS, USERS, SHORTEST, LONGEST = 64, 5, 32, 16, 128
TRAINING = 600  # seconds of training between two checkpoints, as checkpoint.every_minutes has it
_COPIES_ON_DISK = 5  # ours, DCP's two formats, the plain copy, and the one that is being written


@dataclass(frozen=True)
class Setting:
    """What one group of processes measures."""

    rows: int
    ranks: int
    repeats: int


def main():
    """Measures, prints, writes."""
    options = parse()
    console = Console()
    facts = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts["versions"] |= {name: importlib.metadata.version(name) for name in ("safetensors", "xxhash")}
    facts["file_system"] = file_system(options.folder)
    results, not_run = [], []
    for rows in options.rows:
        for ranks in options.ranks:
            begin = time.perf_counter()
            try:
                results += in_own_processes(Setting(rows, ranks, options.repeats), options.folder)
            except ProcessExitedException as error:
                reason = f"a rank's process ended ({error}), most likely for want of memory"
                not_run.append({"rows": rows, "ranks": ranks, "reason": reason})
                continue
            console.print(f"{rows:,} rows, ranks: {ranks} ({time.perf_counter() - begin:.0f} s)")
    record = {
        "command": "python benchmarks/checkpoint.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"dim": DIM, **{name: getattr(options, name) for name in ("rows", "ranks", "repeats", "short")}},
        "machine": facts,
        "results": results,
        "not_run": not_run,
    }
    show(console, record)
    if options.output:
        write_json(options.output, record)
        console.print(f"written: {options.output}")
    sys.exit(bool(not_run))


def parse(arguments=None):
    """The command line; `--short` settles what was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", help="rows of the table (1000000 10000000)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="local processes (1 2)")
    parser.add_argument("--repeats", type=positive, help="how often each is saved and loaded (3)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are written")
    parser.add_argument("--output", "--json", type=Path, help="the JSON (checkpoint.json beside this script, --short: none)")
    parser.add_argument("--short", action="store_true", help="100000 rows, 1 repeat")
    options = parser.parse_args(arguments)
    options.rows = options.rows or ([10**5] if options.short else [10**6, 10**7])
    options.repeats = options.repeats or (1 if options.short else 3)
    if min(options.rows) < 2 * DOMAINS:
        parser.error(f"--rows {min(options.rows)}: give at least {2 * DOMAINS}, two in each domain")
    if options.output is None and not options.short:
        options.output = Path(__file__).with_suffix(".json")
    if options.output is not None and not options.output.resolve().parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.resolve().parent}")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: there is no such folder")
    needed, free = _COPIES_ON_DISK * (table_bytes(max(options.rows)) + 2**24), shutil.disk_usage(options.folder).free
    if free < needed:
        parser.error(
            f"--folder {options.folder}: {max(options.rows)} rows take {needed / 1e9:.1f} GB there for a while, and "
            f"{free / 1e9:.1f} GB are free: make room, or give a folder on another disk"
        )
    return options


def table_bytes(rows):
    """The weights and row-wise Adagrad's one number a row, float32."""
    return rows * (DIM + 1) * 4


def file_system(folder):
    """The kind of file system that a folder lies on, None where it cannot be told."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    points = {Path(line.split()[1]): line.split()[2] for line in lines}  # of two at one place the later one is seen
    return next((points[place] for place in [folder.resolve(), *folder.resolve().parents] if place in points), None)


def in_own_processes(setting, folder):
    """The lines of the JSON's `results` for one setting, measured by `setting.ranks` new processes.

    Raises ProcessExitedException where one of them is killed.
    """
    with socket.socket() as probe:  # a port that nobody listens on now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=folder) as own:
        group = spawn(_rank, (setting, Path(own), port), nprocs=setting.ranks, join=False)
        try:
            while not group.join():  # True once all have ended
                pass
        finally:  # whatever ends this, nobody writes into the folder while it is removed
            for process in group.processes:
                process.kill()
                process.join()
        return json.loads((Path(own) / "results.json").read_text())


def _rank(rank, setting, folder, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.ranks, "LOCAL_WORLD_SIZE": setting.ranks}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore", FutureWarning)  # torch calls what it has deprecated
    with distributed.joined() as ranks:
        results = measure(setting, ranks, folder)
    if ranks.first:
        write_json(folder / "results.json", results)
    sys.stdout.flush()
    os._exit(0)  # without Python's teardown: trainer.process says why


def measure(setting, ranks, folder):
    """Saves by every system in turn, as often as asked, then loads. Called on all ranks of a group; returns its lines."""
    trainer, _ = built(setting, ranks)
    for step in range(2):  # so that both optimizers have their state
        arrays = draw(trainer.dataset, step * ranks.world_size + ranks.rank, USERS, SHORTEST, LONGEST, trainer.config.negatives)
        trainer.train_step(build_batch(*arrays, [domain.items for domain in trainer.dataset.domains], LONGEST))
    ours = Ours(trainer, folder)
    safetensors = dcp.HuggingFaceStorageReader, lambda path: dcp.HuggingFaceStorageWriter(path, save_distributed=True)
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
    for _ in range(setting.repeats):  # in turn: what else the machine does then meets all of them
        for system in systems:
            saves[system.name].append(timed_save(system))
    fresh, build_seconds = built(setting, ranks)
    loads = {system.name: [] for system in systems if system.loaded}
    for _ in range(setting.repeats):
        for system in systems:
            if system.loaded:
                loads[system.name].append(timed_load(system, trainer, fresh))
    results = []
    for system in systems:
        line = {"system": system.name, "rows": setting.rows, "ranks": setting.ranks}
        line |= {"bytes": system.size, "table_bytes": table_bytes(setting.rows), "files": system.files}
        line["save"] = summary_of_saves(saves[system.name], system.size)
        line["load"] = summary_of_loads(loads[system.name], system.size) if system.loaded else None
        if system is ours:
            line["load"]["build_seconds"] = build_seconds
        results.append(line)
    return results


def built(setting, ranks):
    """A trainer with a table of the setting's rows, and the seconds that this took."""
    model = ModelConfig(
        dim=DIM, max_length=LONGEST, experts=5, cross_experts=3, blocks=2, heads=1, ffn_dim=DIM, dropout=0.1, loss="bpr"
    )
    config = RunConfig(global_batch_size=USERS * ranks.world_size, model=model)
    dataset = replace(dataset_of(setting.rows, DOMAINS, config.global_batch_size, 2), streams=ranks.world_size)
    plan = Plan(dataset, config.global_batch_size, ranks.world_size, config.seed)
    made = []
    (seconds,) = timed(lambda: made.append(Trainer(config, ranks, dataset, plan)))
    return made[0], seconds


class System:
    """A way to keep a trainer's state. What it does is a list of actions, each timed from the start of the first."""

    name: str
    loaded = True  # False: there is nothing to load, or another system's files are the same
    size, files = 0, {}  # of the last save, in bytes

    def __init__(self, trainer, folder):
        self.trainer, self.folder = trainer, folder / self.name.replace(" ", "-")

    def saving(self):
        """The first action is what blocks training."""
        raise NotImplementedError

    def loading(self, fresh):
        """Into `fresh`, a Trainer; None: it loads into nothing."""
        raise NotImplementedError

    def written(self):
        """The folder with the files of the last save, None where there is none."""
        return self.folder


class Ours(System):
    """The trainer's own checkpoints."""

    name = "ours"

    def __init__(self, trainer, folder):
        super().__init__(trainer, folder)
        facts = {"config": flat(trainer.config), "dataset": trainer.dataset.fingerprint}
        self._checkpoints, self._state = Checkpoints(self.folder, 1, trainer.ranks, facts), RunState(trainer.step)

    def saving(self):
        self._state.step += 1  # the state that was saved last is not saved again
        return [
            lambda: self._checkpoints.save(self.trainer.engine, self.trainer.table, self._state),
            self._checkpoints.finish,
        ]

    def loading(self, fresh):
        model = SyNCRec(fresh.config.model, len(fresh.dataset.domains))  # restored before an engine is built around it
        found = []

        def restore():
            restore_model(found[0], model)
            restore_optimizers(found[0], fresh.engine, fresh.table)

        return [lambda: found.extend(newest(self.folder, fresh.ranks, print)), restore]

    def written(self):
        return checkpoints(self.folder)[0]


class DCP(System):
    """torch.distributed.checkpoint in the foreground."""

    def __init__(self, name, trainer, folder, reader, writer):
        self.name, self._reader, self._writer = name, reader, writer
        super().__init__(trainer, folder)

    def saving(self):
        state, writer = table_state(self.trainer.table), self._writer(str(self.folder))
        return [lambda: dcp.save(state, storage_writer=writer)]

    def loading(self, fresh):
        state, reader = table_state(fresh.table), self._reader(str(self.folder))
        return [lambda: dcp.load(state, storage_reader=reader)]


class DCPAsync(DCP):
    """torch.distributed.checkpoint with a thread that writes; the files are those of the foreground."""

    loaded = False

    def saving(self):
        state, writer, futures = table_state(self.trainer.table), self._writer(str(self.folder)), []
        return [lambda: futures.append(dcp.async_save(state, storage_writer=writer)), lambda: futures.pop().result()]


class FileCopy(System):
    """Our checkpoint's files copied, and the copies read; the ranks share the files."""

    name = "file copy"

    def __init__(self, trainer, folder, ours):
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

    def loading(self, fresh):
        files = self._share(self.folder)
        memory = [torch.ones(file.stat().st_size, dtype=torch.uint8).numpy() for file in files]

        def read():
            for file, values in zip(files, memory, strict=True):
                with open(file, "rb", buffering=0) as stream:
                    done = 0
                    while count := stream.readinto(values[done:]):  # Linux reads 2 GiB at once at most
                        done += count

        return [read]

    def _share(self, folder):
        """Every ranks-th file: the table's files, one a rank, stand together at the end of the names."""
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


def table_state(table):
    """The table as DCP takes it: TorchRec's ShardedTensors of the weights and of the fused optimizer's state."""
    (state,) = table._parallel.fused_optimizer.state_dict()["state"].values()
    return dict(table._collection.state_dict()) | state


def timed_save(system):
    """Seconds that block, seconds in all, and bytes of memory on all ranks (None where the system does not tell) of a save."""
    ranks = system.trainer.ranks
    if ranks.first:
        shutil.rmtree(system.folder, ignore_errors=True)
        os.sync()
    agree()
    actions = system.saving()
    before = reset_peak_memory()
    laps = timed(*actions)
    taken = torch.tensor([-1 if before is None else peak_memory() - before])
    dist.all_reduce(taken)
    folder = system.written()
    system.files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())} if folder else {}
    system.size = sum(system.files.values()) if folder else table_bytes(system.trainer.table.rows)
    agree()
    if not system.loaded and ranks.first:
        shutil.rmtree(system.folder, ignore_errors=True)
    return laps[0], laps[-1], None if before is None else int(taken)


def timed_load(system, trainer, fresh):
    """Loads from the disk and again from the page cache: {"from_disk": …, "disk": (seconds of each action), "cached": …}.

    Raises ArithmeticError where `fresh` does not get the table that `trainer` has.
    """
    kept, filled = trainer.table.shard()[1], fresh.table.shard()[1]
    load = {}
    for place in ("disk", "cached"):
        for tensor in filled.values():
            tensor.zero_()
        actions = system.loading(fresh)
        if place == "disk":
            agree()
            load["from_disk"] = drop_from_cache(system.written()) if fresh.ranks.first else None
        load[place] = timed(*actions)
        if not isinstance(system, FileCopy) and not all(torch.equal(kept[name], filled[name]) for name in kept):
            raise ArithmeticError(f"{system.name} loads another table than it saved")
    return load


def timed(*actions):
    """Seconds from a start that all ranks share until the end of each action, on the slowest rank. Called on all ranks."""
    agree()
    begin, laps = time.perf_counter(), []
    for action in actions:
        action()
        laps.append(time.perf_counter() - begin)
    slowest = torch.tensor(laps, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def drop_from_cache(folder):
    """Asks the page cache to forget a folder's files; True where at most a hundredth of them is in it afterwards."""
    files = [file for file in folder.iterdir() if file.stat().st_size]
    for file in files:
        flush(file)  # what is not on disk yet stays
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return sum(map(cached_bytes, files)) <= sum(file.stat().st_size for file in files) / 100


def cached_bytes(file):
    """How much of a file, not an empty one, is in the page cache, in whole pages."""
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        size = len(pages)
        cached = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))  # a byte a page, its lowest bit: it is there
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), cached)
        del start  # it holds the mapping
    return size if failed else cached.raw.count(1) * mmap.PAGESIZE


def flush(file):
    """To disk."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def reset_peak_memory():
    """Lets `peak_memory` begin anew; returns the memory that is held now, in bytes, None where Linux's files do not say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier saves left free would be taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def peak_memory():
    """The most memory, in bytes, that this process held since `reset_peak_memory`."""
    return _status("VmHWM")


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def summary_of_saves(saves, size):
    """What the JSON says of a system's saves. saves: what `timed_save` gave."""
    blocking, seconds, memory = zip(*saves, strict=True)
    median = statistics.median(blocking)
    return {
        "blocking_seconds": spread(blocking),
        "blocking_share": median / TRAINING,
        "seconds": spread(seconds),
        "bytes_per_second": size / statistics.median(seconds),
        "memory_bytes": None if None in memory else max(memory),
    }


def summary_of_loads(loads, size):
    """What the JSON says of a system's loads. loads: what `timed_load` gave."""
    summary = {"from_disk": all(load["from_disk"] for load in loads)}
    for place in ("disk", "cached"):
        seconds = [load[place][-1] for load in loads]
        summary[place] = {"seconds": spread(seconds), "bytes_per_second": size / statistics.median(seconds)}
        if len(loads[0][place]) > 1:
            summary[place]["verify_seconds"] = spread([load[place][0] for load in loads])
    return summary


def spread(values):
    """Median, extremes, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def show(console, record):
    """Two tables a setting, and below them what they were measured on."""
    results = record["results"]
    for rows, ranks in dict.fromkeys((line["rows"], line["ranks"]) for line in results):
        lines = [line for line in results if (line["rows"], line["ranks"]) == (rows, ranks)]
        console.print(_saves(lines, f"{rows:,} rows of {DIM} floats, ranks: {ranks}; {lines[0]['bytes'] / 1e6:,.0f} MB"))
        console.print(_loads([line for line in lines if line["load"]]))
    for left_out in record["not_run"]:
        console.print(f"{left_out['rows']:,} rows, ranks: {left_out['ranks']}, not run: {left_out['reason']}", soft_wrap=True)
    facts, repeats = record["machine"], record["settings"]["repeats"]
    console.print(f"share: of {TRAINING} s of training. {facts['processor']}, {facts['cores']} cores, {facts['file_system']}")
    console.print(f"Medians of {repeats}, min - max.")
    if facts["file_system"] in ("tmpfs", "ramfs"):
        console.print("These files lay in memory: give a --folder on a disk.")
    elif not all(line["load"]["from_disk"] for line in results if line["load"]):
        console.print("Not all files left the page cache before they were loaded from disk.")
    if facts["load_before"] > 0.5:
        console.print(f"The load was {facts['load_before']:.1f} before the run: on a quiet machine the figures are others.")


def _saves(lines, title):
    table = _table(title, "save", "blocks s", "share", "total s", "min - max", "MB/s", "memory MB")
    for line in lines:
        save = line["save"]
        table.add_row(
            line["system"],
            f"{save['blocking_seconds']['median']:.3f}",
            f"{save['blocking_share']:.3%}",
            *_speed(save),
            "" if save["memory_bytes"] is None else f"{save['memory_bytes'] / 1e6:,.0f}",
        )
    return table


def _loads(lines):
    table = _table(None, "load", "disk s", "min - max", "MB/s", "verify s", "cached s", "MB/s")
    for line in lines:
        disk, (cached, _, cached_speed) = line["load"]["disk"], _speed(line["load"]["cached"])
        verify = f"{disk['verify_seconds']['median']:.3f}" if "verify_seconds" in disk else ""
        table.add_row(line["system"], *_speed(disk), verify, cached, cached_speed)
    return table


def _table(title, what, *names):
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(what, no_wrap=True, min_width=21)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speed(timing):
    seconds = timing["seconds"]
    return (
        f"{seconds['median']:.3f}",
        f"{seconds['min']:.2f}-{seconds['max']:.2f}",
        f"{timing['bytes_per_second'] / 1e6:,.0f}",
    )


if __name__ == "__main__":
    main()
