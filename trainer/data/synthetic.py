"""Synthetic interaction logs of any size, whose truth says which domains help one another.

Every user has an interest, one of `topics`. It moves on with probability `interest_drift` at
each event of the user's merged history. An event in a RELATED domain is about the interest, so
the user's last event in the other related domains tells more than the domain's own, older
history does.

An event in the UNRELATED domain (there is one from three domains on) follows a topic of its
own. That topic moves slowly (`unrelated_drift`) and does not depend on the interest. The
domain's own history tells all there is to know, and the other domains only distract.

An event picks an item of its topic with probability `on_topic`, by a power law within the
topic, and else any item of the domain. Item n of a domain belongs to topic n % topics, and
lower numbers are more popular. Item numbers recur from domain to domain and are different items
there.

With `fashion_days` the popularity of a topic's items drifts: every so many days, each topic on days
of its own, the order of its items is turned by a random number of places. What was popular is then
as any other, and no older history tells what is popular now.

All draws come from counters, so any slice of users can be made on its own.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum, unique
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.child_processes import set_up_worker
from trainer.config.prepare import SyntheticConfig
from trainer.data.counter_rng import random_below, random_bits, random_unit
from trainer.errors import InputError
from trainer.files.progress import Stages
from trainer.files.staged import new_output_folder

_FIRST_SECOND = 1_704_067_200  # 2024-01-01
_DAY_SECONDS = 86400
_YEAR_SECONDS = 365 * _DAY_SECONDS
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
# A dictionary for columns that repeat, few bits for the others: twice as fast as the defaults,
# and half the size.
_ENCODING = {
    "use_dictionary": ["user_id", "domain"],
    "column_encoding": {
        "item_id": "DELTA_BINARY_PACKED",
        "timestamp": "DELTA_BINARY_PACKED",
    },
}


@unique
class _Draw(IntEnum):
    """One number for each purpose of a draw, so that no two use the same bits."""

    LENGTH = 0
    USER = 1
    JOINED = 2
    DOMAIN = 3
    INTEREST_MOVES = 4
    INTEREST = 5
    UNRELATED_MOVES = 6
    UNRELATED = 7
    ON_TOPIC = 8
    ITEM = 9
    GAP = 10
    FASHION_BEGINS = 11
    FASHION = 12


@dataclass(frozen=True)
class Events:
    """Events of some users, one user after the other, each user's in order of time: int64 (N,).

    topic: the topic that the event follows.

        Two domains, four users with 2, 1, 3 and 1 events:

        user    0  0 | 1 | 2  2  2 | 3
        item    7  3 | 7 | 0  4  0 | 9
        domain  0  1 | 0 | 1  1  0 | 1
        time   10 25 | 4 | 8 31 32 | 6
        topic   3  3 | 3 | 0  0  0 | 1
    """

    user: np.ndarray
    item: np.ndarray
    domain: np.ndarray
    time: np.ndarray
    topic: np.ndarray


@dataclass(frozen=True)
class _FileOfUsers:
    """A file to write: the events of the users [first_user, last_user)."""

    path: Path
    first_user: int
    last_user: int


def draw_lengths(
    config: SyntheticConfig,
    first: int,
    last: int,
) -> np.ndarray:
    """Draws how many interactions the users [first, last) have, int64.

    They are geometric from 1, with the mean of the config.
    """
    if config.mean_length == 1:
        return np.ones(last - first, dtype=np.int64)
    users = np.arange(first, last)
    unit = random_unit(random_bits(config.seed, _Draw.LENGTH, users))
    stop_probability = 1 / config.mean_length
    more = np.log1p(-unit) / np.log1p(-stop_probability)
    return 1 + more.astype(np.int64)


def generate_events(
    config: SyntheticConfig,
    first: int,
    last: int,
) -> Events:
    """Draws the events of the users [first, last), the same whatever else is made."""
    lengths = draw_lengths(config, first, last)
    users = np.arange(first, last)
    user = np.repeat(users, lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(user)) - np.repeat(starts, lengths)
    # One counter an event: the user's own random 64 bits plus the position.
    user_bits = random_bits(config.seed, _Draw.USER, users)
    first_counter = np.repeat(user_bits, lengths)
    with np.errstate(over="ignore"):
        counter = first_counter + position.astype(np.uint64)

    domain_unit = _draw_unit(_Draw.DOMAIN, counter)
    last_domain_ends = np.cumsum(config.shares)[:-1]
    domain = np.searchsorted(last_domain_ends, domain_unit, side="right")
    topic = _draw_topics(config, counter, position == 0, domain)

    mean_gap = config.hours * 3600
    gap_unit = _draw_unit(_Draw.GAP, counter)
    gaps = 1 - np.log1p(-gap_unit) * mean_gap
    elapsed = np.cumsum(gaps.astype(np.int64))
    joined_bits = random_bits(config.seed, _Draw.JOINED, users)
    joined = random_below(joined_bits, _YEAR_SECONDS)
    shift = np.repeat(joined - elapsed[starts], lengths)
    time = _FIRST_SECOND + elapsed + shift
    turned = _turn_topics(config, domain, topic, time)
    item = _draw_items(config, counter, domain, topic, turned)
    return Events(user, item, domain, time, topic)


def _draw_unit(draw: _Draw, counter: np.ndarray) -> np.ndarray:
    """Draws a number in [0, 1) for each event."""
    return random_unit(random_bits(draw, counter))


def _draw_topics(
    config: SyntheticConfig,
    counter: np.ndarray,
    is_first: np.ndarray,
    domain: np.ndarray,
) -> np.ndarray:
    """Draws the topic that each event follows. is_first: the event is its user's first."""

    def draw_moving_topic(
        drift: float,
        moves: _Draw,
        topics: _Draw,
    ) -> np.ndarray:
        """Draws a topic anew where it moves on, and repeats it until then."""
        moves_on = _draw_unit(moves, counter) < drift
        moved = np.flatnonzero(is_first | moves_on)
        bits = random_bits(topics, counter[moved])
        drawn = random_below(bits, config.topics)
        events_until_move = np.diff(moved, append=len(counter))
        return np.repeat(drawn, events_until_move)

    interest = draw_moving_topic(
        config.interest_drift, _Draw.INTEREST_MOVES, _Draw.INTEREST
    )
    if config.related == config.domains:
        return interest
    unrelated = draw_moving_topic(
        config.unrelated_drift, _Draw.UNRELATED_MOVES, _Draw.UNRELATED
    )
    return np.where(domain >= config.related, unrelated, interest)


def _turn_topics(
    config: SyntheticConfig,
    domain: np.ndarray,
    topic: np.ndarray,
    time: np.ndarray,
) -> np.ndarray:
    """By how many places the order of each event's topic is turned then, as random bits; 0 without."""
    if not config.fashion_days:
        return np.zeros(len(topic), np.uint64)
    own_topic = domain * config.topics + topic
    begins = random_unit(
        random_bits(config.seed, _Draw.FASHION_BEGINS, own_topic)
    )
    days = (time - _FIRST_SECOND) / _DAY_SECONDS
    fashion = np.floor(days / config.fashion_days + begins).astype(np.int64)
    return random_bits(config.seed, _Draw.FASHION, own_topic, fashion)


def _draw_items(
    config: SyntheticConfig,
    counter: np.ndarray,
    domain: np.ndarray,
    topic: np.ndarray,
    turned: np.ndarray,
) -> np.ndarray:
    """Draws the item of each event: one of its topic, or any of its domain.

    Both picks are one power law over a number of ranks: the topic's items, or the domain's. turned:
    as `_turn_topics` gives it.
    """
    on_topic = _draw_unit(_Draw.ON_TOPIC, counter) < config.on_topic
    laws_of_domain = config.topics + 1
    law_in_domain = np.where(on_topic, topic, config.topics)
    law = domain * laws_of_domain + law_in_domain
    ranks_of_law, span_of_law = _popularity_laws(config)
    rank = _draw_power_law(
        _draw_unit(_Draw.ITEM, counter),
        ranks_of_law[law],
        span_of_law[law],
        config.exponent,
    )
    if config.fashion_days:
        ranks = ranks_of_law[law]
        rank_now = (rank + random_below(turned, ranks)) % ranks
        rank = np.where(on_topic, rank_now, rank)
    return np.where(on_topic, rank * config.topics + topic, rank)


@functools.lru_cache(maxsize=8)
def _popularity_laws(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns what an item may be picked from: numbers of ranks and their spans.

    Both are of shape (D · (topics + 1),). Index domain · (topics + 1) + topic stands for the
    topic's items, and topic `topics` for the whole domain.
    """
    domain_items = config.domain_items
    topic_items = (
        domain_items[:, None] - np.arange(config.topics) + config.topics - 1
    ) // config.topics
    ranks = np.column_stack([topic_items, domain_items]).ravel()
    return ranks, _power_law_span(ranks, config.exponent)


def _draw_power_law(
    unit: np.ndarray,
    count: np.ndarray,
    span: np.ndarray,
    exponent: float,
) -> np.ndarray:
    """Draws ranks in [0, count), P(rank) close to (rank + 1) ** -exponent.

    It is a continuous law on [1, count + 1), rounded down. It needs no table of ranks, so a
    domain may have any number of items. span: `_power_law_span` of the counts.
    """
    if _is_one(exponent):
        value = np.exp(unit * span)
    else:
        value = (1 + unit * span) ** (1 / (1 - exponent))
    return np.minimum(value.astype(np.int64) - 1, count - 1)


def _power_law_span(count: np.ndarray, exponent: float) -> np.ndarray:
    """Returns what the continuous law's inverse is scaled by, float64."""
    if _is_one(exponent):
        return np.log1p(count)
    return (count + 1.0) ** (1 - exponent) - 1


def _is_one(exponent: float) -> bool:
    return abs(exponent - 1) < 1e-9


def synthesize_logs(
    output: str | Path,
    config: SyntheticConfig,
    first_user: int = 0,
    last_user: int | None = None,
    processes: int | None = None,
) -> int:
    """Writes Parquet files of events (by user, then time) and `_truth.json`; counts the events.

    first_user, last_user: write the users [first_user, last_user) of the config's alone (None:
    to the last one). Their rows are the same as in the whole.
    processes: how many write, each whole files (None: one for every core that this process may
    use). The files are the same for any number. With one, or one file, this process writes.
    _truth.json: the domains, which of them are related, the users, and the whole config.

    Memory does not grow with users or items: about 200 MB a process. Progress and the time left
    are shown on stderr if it is a terminal.
    Raises InputError: the output folder already holds something or cannot be written, there are
    no such users, a process ends before its time.
    """
    if last_user is None:
        last_user = config.users
    if not 0 <= first_user < last_user <= config.users:
        raise InputError(
            f"users from first_user {first_user} to below last_user {last_user} "
            f"are none of the {config.users}: "
            f"0 <= first_user < last_user <= {config.users}"
        )
    if processes is None:
        processes = _available_cores()
    if processes < 1:
        raise InputError(f"processes is {processes}: it must be at least 1")
    interactions = 0
    with (
        new_output_folder(output) as (folder, _),
        Stages() as stages,
        stages("writing logs", last_user - first_user) as advance,
    ):
        files = _plan_files(config, folder, first_user, last_user)
        processes = min(processes, len(files))
        for users, events in _write_logs(config, files, processes):
            interactions += events
            advance(users)
        _write_truth(config, folder, first_user, last_user, interactions)
    return interactions


def _available_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan_files(
    config: SyntheticConfig,
    folder: Path,
    first_user: int,
    last_user: int,
) -> list[_FileOfUsers]:
    """Divides the users into files of about `_FILE_EVENTS` events."""
    file_users = max(1, int(_FILE_EVENTS / config.mean_length))
    files = []
    for number, first in enumerate(range(first_user, last_user, file_users)):
        path = folder / f"part-{number:05d}.parquet"
        last = min(first + file_users, last_user)
        files.append(_FileOfUsers(path, first, last))
    return files


def _write_truth(
    config: SyntheticConfig,
    folder: Path,
    first_user: int,
    last_user: int,
    interactions: int,
) -> None:
    """Writes `_truth.json`."""
    names = config.names
    truth = {
        "domains": names,
        "related": names[: config.related],
        "unrelated": names[config.related :],
        "interactions": interactions,
        "first_user": first_user,
        "last_user": last_user,
        "config": dataclasses.asdict(config),
    }
    text = json.dumps(truth, indent=1) + "\n"
    (folder / "_truth.json").write_text(text, encoding="utf-8")


def _write_logs(
    config: SyntheticConfig,
    files: list[_FileOfUsers],
    processes: int,
) -> Iterator[tuple[int, int]]:
    """Writes the files; yields (users, events) of each row group that is written."""
    if processes == 1:
        yield from _write_files(config, files)
        return
    # Forked from a process with threads, a child may wait for ever.
    context = multiprocessing.get_context("spawn")
    running = {}
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work,
                args=(
                    os.getpid(),
                    sender,
                    config,
                    files[number::processes],
                ),
                daemon=True,
            )
            running[receiver] = process
            process.start()
            sender.close()  # the child's alone: it ends with the child
        yield from _receive_progress(dict(running))
    finally:
        # Whatever ends this, nobody writes into the folder while it is removed.
        for process in running.values():
            process.kill()
            process.join()


def _receive_progress(
    running: dict[Connection, BaseProcess],
) -> Iterator[tuple[int, int]]:
    """Yields what the processes send, by their pipes, until all have ended."""
    while running:
        # `wait` gives back some of what it is given.
        ready = cast(list[Connection], wait(list(running)))
        for receiver in ready:
            try:
                message = receiver.recv()
            except EOFError:
                process = running.pop(receiver)
                process.join()
                if process.exitcode:
                    raise _failed_process(process.exitcode) from None
                continue
            if isinstance(message, Exception):
                raise message
            yield message


def _failed_process(exitcode: int) -> InputError:
    """Returns the error for a process that ended before its time."""
    reason = f"status {exitcode}"
    if exitcode < 0:
        reason = f"signal {-exitcode}"
    return InputError(
        f"a process that was writing ended by {reason} (for want of memory?): "
        "try again with fewer processes"
    )


def _work(
    parent: int,
    sender: Connection,
    config: SyntheticConfig,
    files: list[_FileOfUsers],
) -> None:
    """Writes a child process's files; sends (users, events) of each group, or an OSError."""
    set_up_worker(parent)
    try:
        for progress in _write_files(config, files):
            sender.send(progress)
    except BrokenPipeError:  # the parent is gone
        return
    except OSError as error:
        sender.send(error)


def _write_files(
    config: SyntheticConfig, files: list[_FileOfUsers]
) -> Iterator[tuple[int, int]]:
    """Writes files, row group by row group; yields (users, events) of each group."""
    chunk_users = max(1, int(_CHUNK_EVENTS / config.mean_length))
    group_users = chunk_users * _ROW_GROUP_CHUNKS
    make_batch = _batch_maker(config)
    for file in files:
        with pq.ParquetWriter(file.path, _SCHEMA, **_ENCODING) as writer:
            for group_first in range(
                file.first_user, file.last_user, group_users
            ):
                group_last = min(group_first + group_users, file.last_user)
                batches = []
                for first in range(group_first, group_last, chunk_users):
                    last = min(first + chunk_users, group_last)
                    batches.append(make_batch(first, last))
                group = pa.Table.from_batches(batches)
                writer.write_table(group, row_group_size=len(group))
                yield group_last - group_first, len(group)


def _batch_maker(
    config: SyntheticConfig,
) -> Callable[[int, int], pa.RecordBatch]:
    """Returns a function that makes the rows of the users [first, last)."""
    names = pa.array(config.names)

    def make_batch(first: int, last: int) -> pa.RecordBatch:
        events = generate_events(config, first, last)
        domain_numbers = pa.array(events.domain.astype(np.int32))
        columns = [
            pa.array(events.user),
            pa.array(events.item),
            pa.DictionaryArray.from_arrays(domain_numbers, names),
            pa.array(events.time),
        ]
        return pa.record_batch(columns, schema=_SCHEMA)

    return make_batch
