"""What the times of a log are: dates, or numbers of some unit.

Dates are microseconds since 1970 in a dataset. The unit of numbers is what --time-unit says, or
what their size says: 1.7e9 is a second of this century, 1.7e12 a millisecond of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.config.prepare import DATES, NUMBERS, TIME_UNITS, UNKNOWN
from trainer.errors import InputError

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
    """The kind of a log's times, and their unit: a key of TIME_UNITS, or UNKNOWN."""

    kind: str
    unit: str

    @classmethod
    def of(
        cls, dates: bool, newest: float | None, unit: str | None = None
    ) -> "LogTimes":
        """Tells the kind of times by the newest of them.

        unit: of numbers, where it is given, and their size says no other.
        """
        if dates:
            return cls(DATES, "us")
        guessed_unit = guess_unit(newest)
        if guessed_unit == UNKNOWN and unit is not None:
            return cls(NUMBERS, unit)
        return cls(NUMBERS, guessed_unit)

    def __str__(self) -> str:
        if self.kind == DATES:
            return DATES
        if self.unit == UNKNOWN:
            return NUMBERS
        return f"numbers ({_NAMES[self.unit]})"


def guess_unit(time: float | None) -> str:
    """Returns the unit in which a time since 1970 is one of our days, or UNKNOWN."""
    if time is None or not math.isfinite(time):
        return UNKNOWN
    for unit, second in TIME_UNITS.items():
        if _EARLIEST <= time / second <= _LATEST:
            return unit
    return UNKNOWN


def refuse_other_times(
    name: object, times: LogTimes, log: object, log_times: LogTimes
) -> None:
    """Raises InputError where a log's times are of another kind, or unit, than a dataset's.

    name, log: of the dataset and of the log. What is not known of either is not compared.
    """
    pairs = (
        {times.kind, log_times.kind},
        {times.unit, log_times.unit},
    )
    for pair in pairs:
        if len(pair - {UNKNOWN}) > 1:
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
            if unit != UNKNOWN:
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
