"""Numbered users and items, and the rows of the item matrix M that the domains own."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from trainer.config.prepare import NUMBERS, UNKNOWN
from trainer.errors import InputError
from trainer.files.staged import write_record

INT32_MAX = 2**31 - 1
# Hexadecimal digits of an MD5 by which users are numbered: 60 bits, which every engine's BIGINT
# holds.
HASH_DIGITS = 15
_LEAST_FREE_ROWS = 64
_SUMMARY = "facts.json"


@dataclass(frozen=True)
class Ids:
    """The users 0 … U − 1, the N interactions, and by domain the items and the rows of M.

    first_time, last_time: of the logs. time_kind, time_unit: see `LogTimes`.

    Beside this summary lie Parquet files, in two folders:

        users/   user_id, "user" (the number), key (see tie_order.py)
        items/   domain (its number), name, item_id, item (0, 1, … by domain and text of the
                 id), total (interactions), row (of M), key
    """

    users: int
    interactions: int
    names: tuple[str, ...]
    items: tuple[int, ...]
    rooms: tuple[int, ...]
    first_time: float
    last_time: float
    time_kind: str = NUMBERS
    time_unit: str = UNKNOWN

    @property
    def starts(self) -> list[int]:
        """First row of each domain, and behind them the number of rows."""
        return [0, *itertools.accumulate(self.rooms)]

    def check(self) -> None:
        """Raises InputError where they cannot be a dataset."""
        for name, items in zip(self.names, self.items, strict=True):
            if items < 2:
                raise InputError(
                    f"domain {name!r} has one item: there is no other to tell it from "
                    "(negatives are impossible); leave it out with --min-domain"
                )
        refuse_beyond_int32(self.starts[-1], "rows of the item matrix")

    def save(self, folder: Path) -> None:
        """Writes the summary `facts.json` into the folder."""
        write_record(folder / _SUMMARY, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Ids":
        """Reads the summary that `save` wrote."""
        record = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        for name in ("names", "items", "rooms"):
            record[name] = tuple(record[name])
        return cls(**record)


def reserve_rows(items: int) -> int:
    """Returns the rows of M for a domain of so many items: a tenth more, 64 more at least."""
    return items + max(_LEAST_FREE_ROWS, items // 10)


def refuse_beyond_int32(count: int, noun: str) -> None:
    """Raises InputError where so many users, items or rows cannot be numbered."""
    if count > INT32_MAX:
        raise InputError(
            f"{count:,} {noun} are more than int32 can number ({INT32_MAX:,}): "
            "drop rare ones with --min-item"
        )
