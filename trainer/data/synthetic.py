"""Synthetic interaction logs of any size, with a truth that says which domains help one another.

Every user has an interest, one of `topics`, which moves on with probability `interest_drift` at each event of the user's
merged history. An event in a RELATED domain is about the interest, so what the user last did in the other related domains
tells more of the next event than the domain's own, older history does. An event in the UNRELATED domain (there is one
from three domains on) follows a topic of its own, which moves slowly (`unrelated_drift`) and never looks at the interest:
its own history tells all there is to know, and the other domains only distract. An event picks an item of its topic with
probability `on_topic`, by a power law within the topic, and else any item of the domain.

Item n of a domain belongs to topic n % topics, and lower numbers are more popular. Item numbers recur from domain to domain
and are different items there. All draws come from counters, so any slice of users can be made on its own.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.counter_rng import random_below, random_bits, random_unit
from trainer.errors import InputError
from trainer.files.output_folder import new_folder
from trainer.files.progress import Stages

_NAMES = (
    "shop",
    "video",
    "navi",
    "coupon",
    "music",
    "books",
    "games",
    "travel",
    "news",
)
_UNRELATED = "ads"
_FIRST_SECOND = 1_704_067_200  # 2024-01-01
_CHUNK_EVENTS = 1 << 16  # small enough for the caches
_ROW_GROUP_CHUNKS = 16
_FILE_EVENTS = 1 << 23  # 50 MB
_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "item_id": pa.int64(),
        "domain": pa.dictionary(pa.int32(), pa.string()),
        "timestamp": pa.int64(),
    }
)
# What repeats goes by dictionary, what does not in as few bits as it has: twice as fast as the defaults, and half the size.
_ENCODING = {
    "use_dictionary": ["user_id", "domain"],
    "column_encoding": {
        "item_id": "DELTA_BINARY_PACKED",
        "timestamp": "DELTA_BINARY_PACKED",
    },
}


@dataclass(frozen=True)
class SyntheticConfig:
    """How much, and how the truth behaves. `items` counts all domains together, which share it evenly.

    mean_length: mean interactions of a user (geometric, so some users are too short to be evaluated).
    unrelated_share: the unrelated domain's share of the events. exponent: of the popularity's power law.
    hours: mean time between two events of a user.
    """

    users: int = 2000
    items: int = 2000
    domains: int = 4
    mean_length: float = 40.0
    seed: int = 0
    topics: int = 32
    interest_drift: float = 0.1
    unrelated_drift: float = 0.01
    unrelated_share: float = 0.45
    on_topic: float = 0.9
    exponent: float = 1.0
    hours: float = 6.0

    def __post_init__(self):
        at_least = {
            "users": 1,
            "domains": 1,
            "mean_length": 1,
            "seed": 0,
            "topics": 2,
            "exponent": 0,
        }
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise InputError(
                    f"{name} is {getattr(self, name)}: it must be at least {least}"
                )
        for name in (
            "interest_drift",
            "unrelated_drift",
            "unrelated_share",
            "on_topic",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}: it must be at least 0 and below 1"
                )
        if self.items < self.domains * self.topics:
            raise InputError(
                f"items is {self.items}: every domain needs one a topic, {self.domains * self.topics} together"
            )
        if not self.hours > 0:
            raise InputError(f"hours is {self.hours}: it must be above 0")

    @property
    def related(self) -> int:
        """The number of related domains: the first ones."""
        return self.domains - (self.domains > 2 and self.unrelated_share > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, (D,), the unrelated one last."""
        names = [
            *_NAMES,
            *(f"domain{number}" for number in range(len(_NAMES), self.related)),
        ][: self.related]
        return (*names, _UNRELATED)[: self.domains]

    @property
    def shares(self) -> np.ndarray:
        """Shares of the events by domain, float64 (D,): the related ones fall as 1 / sqrt(rank)."""
        related = 1 / np.sqrt(1 + np.arange(self.related))
        unrelated = self.unrelated_share if self.related < self.domains else 0.0
        return np.append(
            related / related.sum() * (1 - unrelated),
            [unrelated] * (self.domains - self.related),
        )

    @property
    def domain_items(self) -> np.ndarray:
        """Items by domain, int64 (D,)."""
        return np.diff(np.arange(self.domains + 1) * self.items // self.domains)

    @functools.cached_property
    def _laws(self):
        """What an item may be picked from: its number of ranks and that number's `_span`, both (D · (topics + 1)).

        Index domain · (topics + 1) + topic stands for the topic's items, and topic `topics` for the whole domain.
        """
        in_topic = (
            self.domain_items[:, None] - np.arange(self.topics) + self.topics - 1
        ) // self.topics
        ranks = np.column_stack([in_topic, self.domain_items]).ravel()
        return ranks, _span(ranks, self.exponent)


@dataclass(frozen=True)
class Events:
    """Events of some users, each user's in order of time, all int64 (N,); `topic` is the topic that the event follows."""

    user: np.ndarray
    item: np.ndarray
    domain: np.ndarray
    time: np.ndarray
    topic: np.ndarray


def lengths_of(config: SyntheticConfig, first: int, last: int) -> np.ndarray:
    """Interactions of the users [first, last): int64, geometric from 1 with the mean of the config."""
    if config.mean_length == 1:
        return np.ones(last - first, dtype=np.int64)
    unit = random_unit(random_bits(config.seed, _Draw.LENGTH, np.arange(first, last)))
    return 1 + (np.log1p(-unit) / np.log1p(-1 / config.mean_length)).astype(np.int64)


def generate(config: SyntheticConfig, first: int, last: int) -> Events:
    """The events of the users [first, last), the same whatever other users are made with them."""
    lengths = lengths_of(config, first, last)
    user = np.repeat(np.arange(first, last), lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(user)) - np.repeat(starts, lengths)
    # One counter an event: the user's own random 64 bits plus the position.
    with np.errstate(over="ignore"):
        counter = np.repeat(
            random_bits(config.seed, _Draw.USER, np.arange(first, last)), lengths
        ) + position.astype(np.uint64)

    def unit(draw):
        return random_unit(random_bits(draw, counter))

    def topic(drift, moves, which):
        """The topic at each event: drawn anew where it moves on, and kept till then."""
        moved = np.flatnonzero((position == 0) | (unit(moves) < drift))
        drawn = random_below(random_bits(which, counter[moved]), config.topics)
        return np.repeat(drawn, np.diff(moved, append=len(counter)))

    domain = np.searchsorted(
        np.cumsum(config.shares)[:-1], unit(_Draw.DOMAIN), side="right"
    )
    followed = topic(config.interest_drift, _Draw.INTEREST_MOVES, _Draw.INTEREST)
    if config.related < config.domains:
        own = topic(config.unrelated_drift, _Draw.UNRELATED_MOVES, _Draw.UNRELATED)
        followed = np.where(domain >= config.related, own, followed)

    # Both picks of an item are one power law over a number of ranks: the topic's items, or the whole domain's.
    on_topic = unit(_Draw.ON_TOPIC) < config.on_topic
    law = domain * (config.topics + 1) + np.where(on_topic, followed, config.topics)
    ranks, span = (of_laws[law] for of_laws in config._laws)
    rank = _power_law(unit(_Draw.ITEM), ranks, span, config.exponent)
    item = np.where(on_topic, rank * config.topics + followed, rank)

    gaps = 1 - np.log1p(-unit(_Draw.GAP)) * (config.hours * 3600)
    elapsed = np.cumsum(gaps.astype(np.int64))
    joined = random_below(
        random_bits(config.seed, _Draw.JOINED, np.arange(first, last)), 365 * 86400
    )
    time = _FIRST_SECOND + elapsed + np.repeat(joined - elapsed[starts], lengths)
    return Events(user, item, domain, time, followed)


class _Draw:
    """One number for each purpose of a draw, so that no two use the same bits."""

    (
        LENGTH,
        USER,
        JOINED,
        DOMAIN,
        INTEREST_MOVES,
        INTEREST,
        UNRELATED_MOVES,
        UNRELATED,
        ON_TOPIC,
        ITEM,
        GAP,
    ) = range(11)


def _power_law(unit, count, span, exponent):
    """Ranks in [0, count), P(rank) close to (rank + 1) ** -exponent: a continuous law on [1, count + 1) rounded down.

    span: `_span` of the counts. It needs no table of ranks, so a domain may have any number of items.
    """
    value = (
        np.exp(unit * span)
        if _is_one(exponent)
        else (1 + unit * span) ** (1 / (1 - exponent))
    )
    return np.minimum(value.astype(np.int64) - 1, count - 1)


def _span(count, exponent):
    """What the continuous law's inverse is scaled by, float64."""
    return np.log1p(count) if _is_one(exponent) else (count + 1.0) ** (1 - exponent) - 1


def _is_one(exponent):
    return abs(exponent - 1) < 1e-9


def synthesize(
    output: str | Path,
    config: SyntheticConfig,
    first_user: int = 0,
    last_user: int | None = None,
    processes: int | None = None,
) -> int:
    """Writes Parquet files of events (by user, then time) and `truth.json`, and returns the number of events.

    first_user, last_user: only the users [first_user, last_user) of the config's (None: to the last one), whose rows are the
    same as in the whole. processes: how many write, each whole files (None: one for every core that this process may use);
    the files are the same for any number, and with one, or one file, all is done here.
    truth.json: the domains, which of them are related, the users, and the whole config. Memory does not grow with users or
    items: about 200 MB a process. Progress and the time left are shown on stderr where that is a terminal.
    Raises InputError: the output folder already holds something or cannot be written, there are no such users, a process ends
    before its time.
    """
    last_user = config.users if last_user is None else last_user
    if not 0 <= first_user < last_user <= config.users:
        raise InputError(
            f"users from first_user {first_user} to below last_user {last_user} are none of the {config.users}: "
            f"0 <= first_user < last_user <= {config.users}"
        )
    if processes is None:
        processes = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count()
        )
    if processes < 1:
        raise InputError(f"processes is {processes}: it must be at least 1")
    names = config.names
    truth = {
        "domains": names,
        "related": names[: config.related],
        "unrelated": names[config.related :],
    }
    file_users = max(1, int(_FILE_EVENTS / config.mean_length))
    count = 0
    with (
        new_folder(output) as (folder, _),
        Stages() as stages,
        stages("writing logs", last_user - first_user) as advance,
    ):
        files = []
        for number, first in enumerate(range(first_user, last_user, file_users)):
            files.append(
                (
                    folder / f"part-{number:05d}.parquet",
                    first,
                    min(first + file_users, last_user),
                )
            )
        for users, events in _written(config, files, min(processes, len(files))):
            count += events
            advance(users)
        truth |= {
            "interactions": count,
            "first_user": first_user,
            "last_user": last_user,
        }
        text = json.dumps({**truth, "config": dataclasses.asdict(config)}, indent=1)
        (folder / "truth.json").write_text(text + "\n", encoding="utf-8")
    return count


def _written(config, files, processes):
    """Writes the files (path, first user, last user) and yields (users, events) of each part of them that is written."""
    if processes == 1:
        yield from _write_files(config, files)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # forked from a process with threads, a child may wait for ever
    running = {}
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            running[receiver] = context.Process(
                target=_work,
                args=(sender, config, files[number::processes]),
                daemon=True,
            )
            running[receiver].start()
            sender.close()  # the child's alone: it ends with the child
        yield from _received(dict(running))
    finally:
        for process in (
            running.values()
        ):  # whatever ends this, nobody writes into the folder while it is removed
            process.kill()
            process.join()


def _received(running):
    """What the processes send, by their pipes, until all have ended."""
    while running:
        for receiver in wait(list(running)):
            try:
                message = receiver.recv()
            except EOFError:
                process = running.pop(receiver)
                process.join()
                if process.exitcode:
                    how = (
                        f"signal {-process.exitcode}"
                        if process.exitcode < 0
                        else f"status {process.exitcode}"
                    )
                    raise InputError(
                        f"a process that was writing ended by {how} (for want of memory?): try again with fewer processes"
                    ) from None
                continue
            if isinstance(message, Exception):
                raise message
            yield message


def _work(sender, config, files):
    """A child process: writes its files, and sends what `_written` yields, or an error of the disk."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent hears it too, and ends this process
    try:
        for written in _write_files(config, files):
            sender.send(written)
    except BrokenPipeError:  # the parent is gone
        return
    except OSError as error:
        sender.send(error)


def _write_files(config, files):
    step = max(1, int(_CHUNK_EVENTS / config.mean_length))
    dictionary = pa.array(config.names)
    for path, first_of_file, last_of_file in files:
        with pq.ParquetWriter(path, _SCHEMA, **_ENCODING) as writer:
            for first_of_group in range(
                first_of_file, last_of_file, step * _ROW_GROUP_CHUNKS
            ):
                last_of_group = min(
                    first_of_group + step * _ROW_GROUP_CHUNKS, last_of_file
                )
                batches = []
                for first in range(first_of_group, last_of_group, step):
                    events = generate(config, first, min(first + step, last_of_group))
                    domain = pa.DictionaryArray.from_arrays(
                        pa.array(events.domain.astype(np.int32)), dictionary
                    )
                    columns = [
                        pa.array(events.user),
                        pa.array(events.item),
                        domain,
                        pa.array(events.time),
                    ]
                    batches.append(pa.record_batch(columns, schema=_SCHEMA))
                group = pa.Table.from_batches(batches)
                writer.write_table(group, row_group_size=len(group))
                yield last_of_group - first_of_group, len(group)
