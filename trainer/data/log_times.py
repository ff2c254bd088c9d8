"""What the times of a log are: dates, or numbers of some unit.

Dates are microseconds since 1970 in a dataset. The unit of numbers is what --time-unit says, or
what their size says: 1.7e9 is a second of this century, 1.7e12 a millisecond of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config.prepare import TIME_UNITS
from trainer.errors import InputError

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset

DATES = "dates"
NUMBERS = "numbers"
# Seconds since 1970 that are a time of somebody's log: of 1985 to 2100.
_EARLIEST = 473e6
_LATEST = 4102e6
_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}


@dataclass(frozen=True)
class LogTimes:
    """The kind of a log's times, and their unit, a key of TIME_UNITS. None: not known."""

    kind: str | None
    unit: str | None

    @classmethod
    def of(
        cls, dates: bool, newest: float | None, unit: str | None = None
    ) -> "LogTimes":
        """Tells the kind of times by the newest of them. unit: of numbers, where it is known."""
        if dates:
            return cls(DATES, "us")
        return cls(NUMBERS, unit or guess_unit(newest))

    def __str__(self) -> str:
        if self.kind == DATES:
            return DATES
        if self.unit:
            return f"numbers ({_NAMES[self.unit]})"
        return NUMBERS


def guess_unit(time: float | None) -> str | None:
    """Returns the unit in which a time since 1970 is one of our days; None: in none."""
    if time is None or not math.isfinite(time):
        return None
    for unit, second in TIME_UNITS.items():
        if _EARLIEST <= time / second <= _LATEST:
            return unit
    return None


def dataset_times(dataset: "Dataset") -> LogTimes:
    """Tells the kind of a dataset's times. One of format version 4 does not say it."""
    if dataset.time_kind is None:
        return LogTimes(None, guess_unit(dataset.last_time))
    return LogTimes(dataset.time_kind, dataset.time_unit)


def refuse_other_times(
    name: object, times: LogTimes, log: object, log_times: LogTimes
) -> None:
    """Raises InputError where a log's times are of another kind, or unit, than a dataset's.

    name, log: of the dataset and of the log. What is not known of either is not compared.
    """
    is_same = True
    for ours, theirs in (
        (times.kind, log_times.kind),
        (times.unit, log_times.unit),
    ):
        if None not in (ours, theirs) and ours != theirs:
            is_same = False
    if is_same:
        return
    raise InputError(
        f"{name}: its times are {times}, those of {log} are {log_times}: "
        "write one kind"
    )


def describe_mixed_units(
    spans: Iterable[tuple[str, float, float]],
) -> str | None:
    """Says that the times of a log's domains look like several units; None where they do not.

    spans: name, first and last time of each domain, which are numbers.
    """
    domain_of_unit: dict[str, str] = {}
    for name, first, last in spans:
        for time in (first, last):
            unit = guess_unit(time)
            if unit is not None:
                domain_of_unit.setdefault(unit, name)
    if len(domain_of_unit) < 2:
        return None
    parts = []
    for unit, name in domain_of_unit.items():
        parts.append(f"{_NAMES[unit]} ({name})")
    return (
        f"times look like {' and '.join(parts)}: the domain with the larger numbers "
        "comes last in every history; write one unit"
    )
