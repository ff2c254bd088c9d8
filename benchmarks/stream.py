"""How fast do shards become batches? Ours beside the disk's own speed and beside a WebDataset
of one user a sample.

    python benchmarks/stream.py data=DATA  a prepared dataset; its shards come into memory once
    python benchmarks/stream.py data=DATA batch_size=256
    python benchmarks/stream.py --short    a small dataset of its own: does it run?

A token is an interaction of a user's training part that is within the newest T; it is counted
once. Batches are those of one rank, in an epoch's order, with negatives that all targets of a
domain share.

- ready: batches ready to use, as a run gets them (`trainer.data.loading.stream.ready`): built
  by worker processes, received by this one, which does nothing else. The clock starts once a
  first round of batches has arrived, and runs over whole rounds: in a round every stream uses
  up a block of users, so each measured round decodes as much as any other. Opening shards,
  which comes once in many rounds, is not in it and is timed apart; `opened_users_per_second`
  counts it in. worker_busy is the share of the time in which a worker reads and builds; in the
  rest it hands over or waits.
- The parts of a batch, in this process and one thread: assign (`BatchSchedule.users`: who is in it),
  read (`Histories.read`: decode blocks and pick users), build (`TrainBatches.build`: trim,
  negatives, both views).
- open, decode: shards one after the other, alone. Opening compares the sha256 and finds the
  members; decoding gives rows.
- raw: the bytes of the same shards, read in order, 1 MiB at once: after the page cache was
  asked to forget them (`posix_fadvise`; from_disk says whether it did), and from the cache.
  What lies below may hold them still.
- webdataset: some users as one sample each, items.npy (int32) and domains.npy (uint8), written
  by `TarWriter` and read by `WebDataset(…).decode()` in this process: histories as arrays, and
  no batch yet.

All but the first raw read find their files in the page cache. The repeats of all of these take
turns; one before them does not count.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import webdataset

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, suite
from benchmarks.workload import described, prepared, some_data
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import ShardFile
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories, read_users
from trainer.data.loading.stream import TrainBatches, batches_of_workers
from trainer.errors import exit_on_input_error

if TYPE_CHECKING:
    from trainer.data.format.dataset import Shard


_SAMPLES = 10_000  # of the WebDataset, a tar
_READ = 1 << 20
_ITEMS = "items.npy"
_DOMAINS = "domains.npy"


@dataclass(frozen=True)
class Settings:
    """settings/stream.yaml."""

    data: str
    users: int
    batch_size: int
    max_length: int  # T
    shared: int
    workers: list[int]
    batches: int
    shards: int
    samples: int
    repeats: int
    folder: str

    def __post_init__(self):
        counted = (
            "batch_size",
            "max_length",
            "shared",
            "workers",
            "batches",
            "shards",
            "samples",
            "repeats",
        )
        suite.at_least(1, self, *counted)
        suite.existing(self.folder)
        some_data(self)


@dataclass(frozen=True)
class Setting:
    """What is measured, on what."""

    dataset: Dataset
    settings: Settings

    @property
    def round(self) -> int:
        """Batches in which every stream uses up a block."""
        return max(
            1,
            self.dataset.streams
            * self.dataset.block_users
            // self.settings.batch_size,
        )

    @property
    def measured(self) -> int:
        """Batches that are timed."""
        return -(-self.settings.batches // self.round) * self.round

    def fed(self, workers: int = 0) -> TrainBatches:
        """Batches of one rank from the first one on, of a plan that has computed nothing yet."""
        given = self.settings
        config = StreamConfig(workers=workers)
        plan = BatchSchedule(
            self.dataset,
            given.batch_size,
            1,
            seed=0,
            max_length=given.max_length,
        )
        return TrainBatches(
            plan,
            0,
            0,
            given.max_length,
            "mean",
            NegativesConfig(shared=given.shared),
            config,
        )

    def tokens(self, users: np.ndarray | slice) -> int:
        """Tokens of some users: numbers, or a slice."""
        lengths = self.dataset.lengths[users].sum(1, dtype=np.int64)
        return int(np.minimum(lengths, self.settings.max_length).sum())


@dataclass(frozen=True)
class Timed:
    """One repeat of one row of the table. bytes: of files, where they are what is read."""

    seconds: float
    users: int
    tokens: int
    bytes: int | None = None
    facts: dict | None = None


@exit_on_input_error
def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("stream", Settings)
    torch.set_num_threads(1)  # as worker processes have it
    record = suite.header("stream", settings, options)
    with suite.scratch(settings.folder, "stream-") as scratch:
        dataset = Dataset.load(
            settings.data or prepared(Path(scratch), settings.users)
        )
        record["machine"]["file_system"] = machine.file_system(
            Path(settings.data or scratch)
        )
        setting = Setting(dataset, settings)
        results = measure(setting, Path(scratch))
    record |= {
        "dataset": described(dataset),
        "measured": setting.measured,
        "round": setting.round,
    }
    suite.save(
        "stream",
        record | {"results": results, "ratios": ratios(results)},
        options,
    )


def measure(setting: Setting, folder: Path) -> list[dict]:
    """The lines of the JSON's `results`."""
    shards = setting.dataset.shards[: setting.settings.shards]
    tars = write_webdataset(setting, folder)
    rows: dict[str, Callable] = {
        f"ready, workers: {workers}": _ready(setting, workers)
        for workers in setting.settings.workers
    }
    rows |= {
        "parts": lambda: parts(setting),
        "shards": lambda: shard_after_shard(setting, shards),
    }
    rows |= {
        "raw from disk": lambda: raw(setting, shards, forget=True),
        "raw from cache": lambda: raw(setting, shards),
    }
    rows |= {"webdataset": lambda: read_webdataset(setting, tars)}
    timed: dict[str, list[Timed]] = {}
    for repeat in range(-1, setting.settings.repeats):
        begin = time.perf_counter()
        for (
            name,
            function,
        ) in (
            rows.items()
        ):  # in turn: what else the machine does then meets all of them
            found = function()
            for row, one in (
                found.items() if isinstance(found, dict) else [(name, found)]
            ):
                if repeat >= 0:
                    timed.setdefault(row, []).append(one)
        print(
            f"{f'repeat {repeat + 1}' if repeat >= 0 else 'warm-up'} "
            f"({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    results = [summary(name, values) for name, values in timed.items()]
    lines = {line["name"]: line for line in results}
    for workers in setting.settings.workers:
        line = lines[f"ready, workers: {workers}"]
        line["workers"] = workers
        line["users_per_second_and_worker"] = line["users_per_second"] / workers
        line["tokens_per_second_and_worker"] = (
            line["tokens_per_second"] / workers
        )
        # Each worker opens every shard.
        line["opened_users_per_second"] = 1 / (
            1 / line["users_per_second"] + 1 / lines["open"]["users_per_second"]
        )
    return results


def _ready(setting, workers):
    return lambda: ready_batches(setting, workers)


def ready_batches(setting: Setting, workers: int) -> Timed:
    """Batches from worker processes."""
    batches = setting.fed(workers)
    begin = time.perf_counter()
    with contextlib.closing(
        batches_of_workers(batches, batches.config, pin_memory=False)
    ) as stream:
        next(stream)
        first = time.perf_counter() - begin
        for _ in range(setting.round - 1):
            next(stream)
        users = []
        built = 0.0
        begin = time.perf_counter()
        for _ in range(setting.measured):
            fed = next(stream)
            users.append(fed.users_B)
            built += fed.seconds
        seconds = time.perf_counter() - begin
    numbers = np.concatenate(users)
    facts = {
        "first_batch_seconds": first,
        "worker_busy": built / workers / seconds,
    }
    return Timed(seconds, len(numbers), setting.tokens(numbers), facts=facts)


def parts(setting: Setting) -> dict[str, Timed]:
    """The same batches in this process, by parts."""
    batches = setting.fed()
    plan = batches.plan
    histories = Histories.of_schedule(batches.plan)
    laps = np.zeros(3)
    users = []
    with contextlib.closing(histories):
        for position in range(setting.round + setting.measured):
            times = [time.perf_counter()]
            epoch, step = plan.locate(position)
            numbers = plan.users(epoch, step, 0)
            times.append(time.perf_counter())
            read = histories.read(numbers)
            times.append(time.perf_counter())
            batches.build(epoch, step, read)
            times.append(time.perf_counter())
            if position >= setting.round:
                laps += np.diff(times)
                users.append(numbers)
    numbers = np.concatenate(users)
    size = len(numbers)
    tokens = setting.tokens(numbers)
    found = {
        name: Timed(float(lap), size, tokens)
        for name, lap in zip(("assign", "read", "build"), laps, strict=True)
    }
    return {
        "all in one process": Timed(float(laps.sum()), size, tokens),
        **found,
    }


def shard_after_shard(
    setting: Setting, shards: "tuple[Shard, ...]"
) -> dict[str, Timed]:
    """Shards opened and decoded in their order, every user once."""
    laps = np.zeros(2)
    for shard in shards:
        times = [time.perf_counter()]
        with contextlib.closing(ShardFile(setting.dataset, shard)) as file:
            times.append(time.perf_counter())
            for number in range(file.count):
                file.block(number)
            times.append(time.perf_counter())
        laps += np.diff(times)
    amount = _amount(setting, shards)
    return {
        name: Timed(float(lap), **amount)
        for name, lap in zip(("open", "decode"), laps, strict=True)
    }


def raw(
    setting: Setting, shards: "tuple[Shard, ...]", forget: bool = False
) -> Timed:
    """The shards' bytes in order, into memory that is used again."""
    paths = [setting.dataset.local(shard.name) for shard in shards]
    facts = {"from_disk": machine.drop_from_cache(paths)} if forget else None
    buffer = bytearray(_READ)
    begin = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return Timed(
        time.perf_counter() - begin, **_amount(setting, shards), facts=facts
    )


def _amount(setting, shards):
    users = slice(
        shards[0].first_user, shards[-1].first_user + shards[-1].users
    )
    size = sum(shard.bytes for shard in shards)
    return {
        "users": users.stop - users.start,
        "tokens": setting.tokens(users),
        "bytes": size,
    }


def write_webdataset(setting: Setting, folder: Path) -> list[str]:
    """The first users in the batches' order as tars of one user a sample, whole histories."""
    plan = setting.fed().plan
    tars = []
    tar = None
    left = min(setting.settings.samples, setting.dataset.users)
    written = 0
    with contextlib.ExitStack() as stack:
        for _, users in read_users(plan, 0, range(plan.steps(0)), 0):
            histories = np.split(users.items_N, np.cumsum(users.lengths_B)[:-1])
            for user, items in list(
                zip(users.number_B.tolist(), histories, strict=True)
            )[: left - written]:
                if written % _SAMPLES == 0:
                    stack.close()
                    tars.append(str(folder / f"webdataset-{len(tars):06d}.tar"))
                    tar = stack.enter_context(webdataset.TarWriter(tars[-1]))
                domains = setting.dataset.domain_of(items).astype(np.uint8)
                tar.write(
                    {
                        "__key__": f"{user:09d}",
                        _ITEMS: items.astype(np.int32),
                        _DOMAINS: domains,
                    }
                )
                written += 1
            if written == left:
                break
    return tars


def read_webdataset(setting: Setting, tars: list[str]) -> Timed:
    """Every sample decoded once."""
    users = []
    begin = time.perf_counter()
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        users.append((sample["__key__"], sample[_ITEMS], sample[_DOMAINS]))
    seconds = time.perf_counter() - begin
    numbers = np.array([int(key) for key, *_ in users])
    return Timed(
        seconds,
        len(numbers),
        setting.tokens(numbers),
        sum(Path(tar).stat().st_size for tar in tars),
    )


def summary(name: str, values: list[Timed]) -> dict:
    """What the JSON says of a row's repeats, which are of the same users."""
    one = values[0]
    seconds = statistics.median(value.seconds for value in values)
    line = {
        "name": name,
        "users": one.users,
        "tokens": one.tokens,
        "bytes": one.bytes,
    }
    line["seconds"] = suite.spread([value.seconds for value in values])
    line |= {
        "users_per_second": one.users / seconds,
        "tokens_per_second": one.tokens / seconds,
    }
    line["bytes_per_second"] = (
        None if one.bytes is None else one.bytes / seconds
    )
    for fact in one.facts or ():
        line[fact] = [value.facts[fact] for value in values]
    return line


def ratios(results: list[dict]) -> dict[str, float]:
    """Ours by what it is held against: users by users, or bytes by bytes."""
    lines = {line["name"]: line for line in results}
    decoding = 1 / sum(
        1 / lines[part]["bytes_per_second"] for part in ("open", "decode")
    )
    reading = 1 / sum(
        1 / lines[part]["users_per_second"] for part in ("open", "decode")
    )
    other = lines["webdataset"]["users_per_second"]
    return {
        **{
            f"{name} / webdataset": line["users_per_second"] / other
            for name, line in lines.items()
            if "workers" in line
        },
        "open and decode / webdataset": reading / other,
        **{
            f"open and decode / {name}": decoding
            / lines[name]["bytes_per_second"]
            for name in lines
            if "raw" in name
        },
    }


def table(record: dict) -> str:
    """What was streamed, a line for each way, and the ratios."""
    data = record["dataset"]
    rows = []
    for line in record["results"]:
        slowest, fastest = (
            line["users"] / line["seconds"][name] for name in ("max", "min")
        )
        speed = line["bytes_per_second"]
        busy = line.get("worker_busy")
        rows.append(
            {
                "": line["name"],
                "users/s (min – max)": f"{line['users_per_second']:,.0f} ({slowest:,.0f} – "
                f"{fastest:,.0f})",
                "million tokens/s": f"{line['tokens_per_second'] / 1e6:,.2f}",
                "MB/s": "" if speed is None else f"{speed / 1e6:,.0f}",
                "users/s, opening counted in": f"{line['opened_users_per_second']:,.0f}"
                if busy
                else "",
                "workers build": f"{statistics.median(busy):.0%} of the time"
                if busy
                else "",
            }
        )
    what = (
        f"{data['users']:,} users, {data['interactions']:,} interactions, "
        f"{data['domains']} domains, {data['rows']:,} rows; "
        f"batches of {record['settings']['batch_size']} users, {record['measured']} a repeat."
    )
    compared = (
        "Ratios: "
        + "; ".join(
            f"{name}: {ratio:.3g}" for name, ratio in record["ratios"].items()
        )
        + "."
    )
    lines = [what, suite.markdown(rows), compared]
    if not all(
        all(line.get("from_disk", [True])) for line in record["results"]
    ):
        lines.append(
            "Not all shards left the page cache before they were read from disk."
        )
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
