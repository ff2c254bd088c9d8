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
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.folder import new_folder
from trainer.data.random import random_below, random_bits, random_unit
from trainer.errors import InputError

_NAMES = ("shop", "video", "navi", "coupon", "music", "books", "games", "travel")
_UNRELATED = "ads"
_FIRST_SECOND = 1_704_067_200  # 2024-01-01
_CHUNK_EVENTS = 1 << 16  # small enough for the caches
_FILE_EVENTS = 1 << 23
_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "item_id": pa.int64(),
        "domain": pa.dictionary(pa.int32(), pa.string()),
        "timestamp": pa.int64(),
    }
)


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
        at_least = {"users": 1, "domains": 1, "mean_length": 1, "seed": 0, "topics": 2, "exponent": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("interest_drift", "unrelated_drift", "unrelated_share", "on_topic"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if self.items < self.domains * self.topics:
            raise InputError(f"items is {self.items}: every domain needs one a topic, {self.domains * self.topics} together")
        if not self.hours > 0:
            raise InputError(f"hours is {self.hours}: it must be above 0")

    @property
    def related(self) -> int:
        """The number of related domains: the first ones."""
        return self.domains - (self.domains > 2 and self.unrelated_share > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, (D,), the unrelated one last."""
        names = [*_NAMES, *(f"domain{number}" for number in range(len(_NAMES), self.related))][: self.related]
        return (*names, _UNRELATED)[: self.domains]

    @property
    def shares(self) -> np.ndarray:
        """Shares of the events by domain, float64 (D,): the related ones fall as 1 / sqrt(rank)."""
        related = 1 / np.sqrt(1 + np.arange(self.related))
        unrelated = self.unrelated_share if self.related < self.domains else 0.0
        return np.append(related / related.sum() * (1 - unrelated), [unrelated] * (self.domains - self.related))

    @property
    def domain_items(self) -> np.ndarray:
        """Items by domain, int64 (D,)."""
        return np.diff(np.arange(self.domains + 1) * self.items // self.domains)


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
    index = np.arange(len(user))
    position = index - np.repeat(starts, lengths)
    # One counter an event: the user's own random 64 bits plus the position.
    with np.errstate(over="ignore"):
        counter = np.repeat(random_bits(config.seed, _Draw.USER, np.arange(first, last)), lengths) + position.astype(np.uint64)

    def unit(draw, where=slice(None)):
        return random_unit(random_bits(draw, counter[where]))

    def topic(drift, moves, which):
        """The topic at each event: drawn anew where it moves on, and kept till then."""
        moved = np.maximum.accumulate(np.where((position == 0) | (unit(moves) < drift), index, 0))
        return random_below(random_bits(which, counter), config.topics)[moved]

    domain = np.searchsorted(np.cumsum(config.shares)[:-1], unit(_Draw.DOMAIN), side="right")
    followed = topic(config.interest_drift, _Draw.INTEREST_MOVES, _Draw.INTEREST)
    if config.related < config.domains:
        own = topic(config.unrelated_drift, _Draw.UNRELATED_MOVES, _Draw.UNRELATED)
        followed = np.where(domain >= config.related, own, followed)

    # Both picks of an item are one power law over a number of ranks: the topic's items, or the whole domain's.
    domain_items = config.domain_items[domain]
    on_topic = unit(_Draw.ON_TOPIC) < config.on_topic
    in_topic = (domain_items - followed + config.topics - 1) // config.topics
    rank = _power_law(unit(_Draw.ITEM), np.where(on_topic, in_topic, domain_items), config.exponent)
    item = np.where(on_topic, rank * config.topics + followed, rank)

    gaps = 1 - np.log1p(-unit(_Draw.GAP)) * (config.hours * 3600)
    elapsed = np.cumsum(gaps.astype(np.int64))
    joined = random_below(random_bits(config.seed, _Draw.JOINED, np.arange(first, last)), 365 * 86400)
    time = _FIRST_SECOND + elapsed + np.repeat(joined - elapsed[starts], lengths)
    return Events(user, item, domain, time, followed)


class _Draw:
    """One number for each purpose of a draw, so that no two use the same bits."""

    LENGTH, USER, JOINED, DOMAIN, INTEREST_MOVES, INTEREST, UNRELATED_MOVES, UNRELATED, ON_TOPIC, ITEM, GAP = range(11)


def _power_law(unit, count, exponent):
    """Ranks in [0, count), P(rank) close to (rank + 1) ** -exponent: a continuous law on [1, count + 1) rounded down.

    It needs no table, so a domain may have any number of items.
    """
    if abs(exponent - 1) < 1e-9:
        value = np.exp(unit * np.log1p(count))
    else:
        value = (1 + unit * ((count + 1.0) ** (1 - exponent) - 1)) ** (1 / (1 - exponent))
    return np.minimum(value.astype(np.int64) - 1, count - 1)


def synthesize(output: str | Path, config: SyntheticConfig) -> int:
    """Writes Parquet files of events (by user, then time) and `truth.json`, and returns the number of events.

    truth.json: the domains, which of them are related, and the whole config. Memory does not grow with users or items.
    Raises InputError: the output folder already holds something or cannot be written.
    """
    names = config.names
    truth = {"domains": names, "related": names[: config.related], "unrelated": names[config.related :]}
    step = max(1, int(_CHUNK_EVENTS / config.mean_length))
    file_users = max(1, int(_FILE_EVENTS / config.mean_length))
    count = 0
    dictionary = pa.array(names)
    with new_folder(output) as (folder, _):
        for number, first_of_file in enumerate(range(0, config.users, file_users)):
            with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", _SCHEMA) as writer:
                last_of_file = min(first_of_file + file_users, config.users)
                for first in range(first_of_file, last_of_file, step):
                    events = generate(config, first, min(first + step, last_of_file))
                    domain = pa.DictionaryArray.from_arrays(pa.array(events.domain.astype(np.int32)), dictionary)
                    columns = [pa.array(events.user), pa.array(events.item), domain, pa.array(events.time)]
                    writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
                    count += len(events.user)
        text = json.dumps({**truth, "interactions": count, "config": dataclasses.asdict(config)}, indent=1)
        (folder / "truth.json").write_text(text + "\n", encoding="utf-8")
    return count
