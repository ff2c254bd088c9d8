"""Settings: how interaction logs are written, which are prepared, and how; and synthetic ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainer.errors import InputError

if TYPE_CHECKING:
    import numpy as np

DOMAIN_COLUMN = "domain"
_DELIMITERS = {"\\t": "\t", "tab": "\t"}
_MOST_DELIMITER = 4  # bytes
_EMPTY = {
    "time_format": "give a format such as '%d/%m/%Y %H:%M', or leave it out",
    "items": "give a file, or leave it out",
    "domain_separator": "give a sign such as '|', or leave it out",
}


# Settings of LogFormat besides the columns' names: left out where they are not given.
LOG_FORM_SETTINGS = (
    "columns",
    "delimiter",
    "time_format",
    "where",
    "items",
    "items_columns",
    "items_delimiter",
    "domain_separator",
)


@dataclass(frozen=True, kw_only=True)
class LogFormat:
    """How interaction logs are written, and which of their rows count.

    columns: the names of all columns, for files without a header line.
    delimiter: what divides the fields, where the file's ending does not say so.
    time_format: of times that are text, as strftime has it.
    where: an expression; only rows for which it holds count (`trainer.data.logs.row_filter`).
    items: a file that has the domain of every item, in `domain_column`.
    items_columns, items_delimiter: `columns` and `delimiter` of that file.
    domain_separator: what stands between several domains of one item, of which the first counts.
    bad_rows: stop at the first row that cannot be used, or skip such rows and count them.
    """

    user_column: str = "user_id"
    item_column: str = "item_id"
    domain_column: str = DOMAIN_COLUMN
    time_column: str = "timestamp"
    columns: Sequence[str] = ()
    delimiter: str | None = None
    time_format: str | None = None
    where: str | None = None
    items: str | None = None
    items_columns: Sequence[str] = ()
    items_delimiter: str | None = None
    domain_separator: str | None = None
    bad_rows: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in ("columns", "items_columns"):
            names = _split_names(name, getattr(self, name))
            object.__setattr__(self, name, names)
        for name in ("delimiter", "items_delimiter"):
            delimiter = getattr(self, name)
            if delimiter is not None:
                delimiter = _DELIMITERS.get(delimiter, delimiter)
                _check_delimiter(name, delimiter)
                object.__setattr__(self, name, delimiter)
        for name, hint in _EMPTY.items():
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty: {hint}")
        if self.bad_rows not in ("stop", "skip"):
            raise InputError(
                f"bad_rows is {self.bad_rows!r}: give 'stop' or 'skip'"
            )
        if self.items is None and (self.items_columns or self.items_delimiter):
            raise InputError(
                "items_columns and items_delimiter are for a file of items: "
                "give --items, or leave them out"
            )

    @property
    def skips_bad_rows(self) -> bool:
        """Whether rows that cannot be used are left out."""
        return self.bad_rows == "skip"

    @property
    def column_by_role(self) -> dict[str, str]:
        """The columns' names by role: user, item, domain, time."""
        return {
            "user": self.user_column,
            "item": self.item_column,
            "domain": self.domain_column,
            "time": self.time_column,
        }

    def check_domain(self, name: str, domain: str | None) -> None:
        """Raises InputError where the one domain of the logs contradicts the rest.

        name: of the setting, for messages.
        """
        if domain is None:
            return
        if domain == "":
            raise InputError(
                f"{name} is empty: give the one domain of these logs a name"
            )
        if self.domain_column != DOMAIN_COLUMN:
            raise InputError(
                f"{name} is {domain!r} and domain_column is {self.domain_column!r}: "
                "one of them says what the domains are"
            )
        if self.items is not None:
            raise InputError(
                f"{name} is {domain!r} and items is {self.items}: "
                "one of them says what the domains are"
            )


def _split_names(setting: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns names that are a list, or one text with commas."""
    if isinstance(names, str):
        names = names.split(",")
    stripped = tuple(name.strip() for name in names)
    for name in stripped:
        if not name or stripped.count(name) > 1:
            raise InputError(
                f"{setting} is {','.join(stripped)}: "
                "give every column a name of its own"
            )
    return stripped


def _check_delimiter(setting: str, delimiter: str) -> None:
    """Raises InputError for what cannot divide fields."""
    size = len(delimiter.encode())
    if not 1 <= size <= _MOST_DELIMITER or set(delimiter) & set("\"'\r\n\0"):
        raise InputError(
            f"{setting} is {delimiter!r}: give one sign or a few, "
            "such as ';', '|', '::' or tab"
        )


LEAST_MEMORY = 500 * 10**6  # bytes
TIE_ORDERS = ("hash", "file")  # see trainer/data/tie_order.py
TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of a second
# Kinds of times, and a unit that is not known: see trainer/data/log_times.py.
DATES = "dates"
NUMBERS = "numbers"
UNKNOWN = "unknown"
_BYTES_BY_UNIT = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
# Two users a shard at least: with one, a multiple of `streams` shards could leave some empty.
_LOWER_BOUNDS = {
    "min_user": 0,
    "min_item": 0,
    "min_domain": 0,
    "seed": 0,
    "streams": 1,
    "shard_users": 2,
    "block_users": 1,
    "processes": 0,
}


@dataclass(frozen=True)
class PrepareConfig(LogFormat):
    """Which logs to prepare, and how.

    domain: names the one domain of logs without a domain column.
    min_user, min_item: drop users and items with fewer interactions, again and again until none
    is left to drop (the k-core).
    min_domain: leave out domains with fewer interactions, and those with a single item, which
    has no other to be told from.
    streams: None: 64, fewer where there are few users.
    extend: the folder of a dataset that these logs extend. Its items keep their rows of M where
    they can.
    keep_log: the dataset keeps its log, so that it can be extended.
    whole_log: these logs replace the log that the extended dataset kept.
    since, days: the window of time that counts. It begins at a time, or so many days before the
    newest row.
    time_unit: the unit of times that are numbers.
    tie_order: of a user's events at the same time: by a hash, or as the rows stand in the files.
    retire: items without an event in the window lose their row.
    """

    inputs: tuple[str, ...]
    output: str
    domain: str | None = None
    min_user: int = 0
    min_item: int = 0
    min_domain: int = 0
    seed: int = 0
    streams: int | None = None
    shard_users: int = 32768
    block_users: int = 1024
    extend: str | None = None
    keep_log: bool = False
    whole_log: bool = False
    since: str | None = None
    days: float | None = None
    time_unit: str | None = None
    retire: bool = False
    tie_order: str = "hash"
    memory: str = "8GB"  # of all processes together
    processes: int = 0  # 0: as many as this process may use cores

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bound in _LOWER_BOUNDS.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(
                    f"{name} is {value}: it must be at least {bound}"
                )
        self.check_domain("domain", self.domain)
        for name in ("extend", "since"):
            if getattr(self, name) == "":
                raise InputError(
                    f"{name} is empty: is a variable not set? Give it a value"
                )
        if self.tie_order not in TIE_ORDERS:
            raise InputError(
                f"tie_order is {self.tie_order!r}: it is hash or file"
            )
        for name in ("whole_log", "retire"):
            if getattr(self, name) and self.extend is None:
                raise InputError(
                    f"{name} is for a dataset that is extended: "
                    "give --extend, or leave it out"
                )
        if self.since is not None and self.days is not None:
            raise InputError(
                "since and days are both given: "
                "one of them says where the window begins"
            )
        if self.days is not None and not 0 < self.days < float("inf"):
            raise InputError(f"days is {self.days}: it must be more than 0")
        memory_bytes(self.memory)

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return memory_bytes(self.memory)


def memory_bytes(text: str) -> int:
    """Converts an amount like 8GB or 500MiB to bytes.

    Raises InputError for a text that is no amount, and for an amount that is too small to read
    logs.
    """
    pattern = r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?"
    match = re.fullmatch(pattern, text.strip().upper())
    if not match or match[2] not in _BYTES_BY_UNIT:
        raise InputError(f"memory {text!r} is no amount like 8GB")
    amount = int(float(match[1]) * _BYTES_BY_UNIT[match[2]])
    if amount < LEAST_MEMORY:
        raise InputError(
            f"memory {text} is too little: "
            f"give {LEAST_MEMORY // 10**6}MB or more with --memory"
        )
    return amount


_RELATED_NAMES = (
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
_UNRELATED_NAME = "ads"
_SYNTHETIC_BOUNDS = {
    "users": 1,
    "domains": 1,
    "mean_length": 1,
    "seed": 0,
    "topics": 2,
    "exponent": 0,
    "fashion_days": 0,
}
_PROBABILITIES = (
    "interest_drift",
    "unrelated_drift",
    "unrelated_share",
    "on_topic",
)


@dataclass(frozen=True)
class SyntheticConfig:
    """How much is made, and how the truth behaves.

    items: of all domains together, which share them evenly.
    mean_length: mean interactions of a user. Lengths are geometric, so some users are too short
    to be evaluated.
    unrelated_share: the unrelated domain's share of the events.
    exponent: of the popularity's power law.
    hours: mean time between two events of a user.
    fashion_days: days after which other items of a topic are popular; 0: never.
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
    fashion_days: float = 0.0

    def __post_init__(self) -> None:
        for name, bound in _SYNTHETIC_BOUNDS.items():
            value = getattr(self, name)
            if not value >= bound:
                raise InputError(
                    f"{name} is {value}: it must be at least {bound}"
                )
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(
                    f"{name} is {value}: it must be at least 0 and below 1"
                )
        least_items = self.domains * self.topics
        if self.items < least_items:
            raise InputError(
                f"items is {self.items}: "
                f"every domain needs one a topic, {least_items} together"
            )
        if not self.hours > 0:
            raise InputError(f"hours is {self.hours}: it must be above 0")

    @property
    def related(self) -> int:
        """The number of related domains, which are the first ones."""
        if self.domains > 2 and self.unrelated_share > 0:
            return self.domains - 1
        return self.domains

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, (D,), the unrelated one last."""
        names = list(_RELATED_NAMES[: self.related])
        for number in range(len(names), self.related):
            names.append(f"domain{number}")
        if self.related < self.domains:
            names.append(_UNRELATED_NAME)
        return tuple(names)

    @property
    def shares(self) -> "np.ndarray":
        """Shares of the events by domain, float64 (D,).

        Those of the related domains fall as 1 / sqrt(number of the domain, from 1).
        """
        import numpy as np  # the page stays light

        related = 1 / np.sqrt(1 + np.arange(self.related))
        unrelated_domains = self.domains - self.related
        unrelated_share = 0.0
        if unrelated_domains:
            unrelated_share = self.unrelated_share
        related = related / related.sum() * (1 - unrelated_share)
        return np.append(related, [unrelated_share] * unrelated_domains)

    @property
    def domain_items(self) -> "np.ndarray":
        """Items by domain, int64 (D,)."""
        import numpy as np  # the page stays light

        bounds = np.arange(self.domains + 1) * self.items // self.domains
        return np.diff(bounds)
