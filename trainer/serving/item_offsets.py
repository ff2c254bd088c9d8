"""The recency term in an export: what counts of the recent past add to each item's score.

    domain-N/counts.npy    float64 (items, J): faded counts as of the folder's day, which are carried on
    domain-N/offsets.npy   float32 (items,): Σ w · log(count + ε), what a service adds
    schema.json            "recency": half-lives, ε, the day and the time until which is counted; each
                           domain's "recency": a and w

A user's vector has a 1 behind it, and an item's vector its offset, so that a score is their inner
product. Faded counts are carried to a later day exactly: all of an item's events have faded alike.

    count(item, t₂) = count(item, t₁) · 0.5 ^ ((t₂ − t₁) / half-life) + the newer events, faded

Of one item with half-life 2, counted as of day 10, and touched once on day 12:

    day 10    3.0
    day 13    3.0 · 0.5 ^ (3 / 2) + 0.5 ^ (1 / 2) = 1.77

This module needs NumPy alone.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.prepare import TIME_UNITS
from trainer.data.recent_counts import DAYS, HUNDREDTHS, Days

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset

Record = dict[str, Any]

COUNTS = "counts.npy"
OFFSETS = "offsets.npy"
RECENCY = "recency"  # the schema's section
_ALL = "all"
_SECONDS_OF_DAY = 86_400
_PARTS = 100  # of the log's time, where it is in no known unit
_UNITS = (DAYS, HUNDREDTHS)


@dataclass(frozen=True)
class CountMoment:
    """For which moment items are counted.

    unit: of half-lives, as `Days` has it. origin, length: a time's day is floor((time − origin) /
    length), in the logs' unit. as_of: the day before which all events count. until: the time of
    the newest event that is counted.

    Of logs in seconds whose newest event is at noon of the day 19,000 since 1970:

        origin 0, length 86,400, as_of 19,001, until 1,641,643,200
    """

    unit: str
    origin: float
    length: float
    as_of: int
    until: float

    @classmethod
    def of(cls, dataset: "Dataset") -> "CountMoment":
        """The day after a dataset's last."""
        last = dataset.last_time
        unit = Days.of(dataset).unit
        if unit == DAYS:
            day = float(TIME_UNITS[dataset.log_times.unit] * _SECONDS_OF_DAY)
            as_of = math.floor(last / day) + 1
            return cls(
                unit,
                0.0,
                day,
                as_of,
                last,
            )
        first = dataset.first_time
        # A little longer, so that the last time is within the last part.
        length = (last - first) / _PARTS * (1 + 2.0**-16)
        return cls(
            unit,
            first,
            length or 1.0,
            _PARTS,
            last,
        )

    @classmethod
    def from_record(cls, record: Record) -> "CountMoment":
        """What `to_record` gave. Raises ValueError, KeyError or TypeError for anything else."""
        numbers = {}
        for name in ("origin", "length", "until"):
            numbers[name] = _read_number(name, record[name])
        as_of = record["as_of"]
        if isinstance(as_of, bool) or not isinstance(as_of, int):
            raise ValueError(f"its as_of is {as_of!r}")
        if record["unit"] not in _UNITS or numbers["length"] <= 0:
            raise ValueError(
                f"its days are {record['length']!r} {record['unit']!r}"
            )
        return cls(
            unit=record["unit"],
            as_of=as_of,
            **numbers,
        )

    def to_record(self) -> Record:
        """{"unit": "days", "origin": 0.0, "length": 86400.0, "as_of": 19001, "until": …}"""
        return asdict(self)

    def day_of(self, time: float) -> int:
        """The day of a time."""
        return math.floor((time - self.origin) / self.length)


@dataclass(frozen=True)
class OffsetFormula:
    """How counts become offsets. half_lives: (J,), infinity for all time. offset: ε."""

    half_lives: tuple[float, ...]
    offset: float

    @classmethod
    def from_record(cls, record: Record) -> "OffsetFormula":
        """Of a schema's section. Raises ValueError, KeyError or TypeError."""
        half_lives = []
        for value in record["half_lives"]:
            number = math.inf
            if value != _ALL:
                number = _read_number("half_lives", value)
            if number <= 0:
                raise ValueError(f"its half_lives have {value!r}")
            half_lives.append(number)
        offset = _read_number("offset", record["offset"])
        if not half_lives or offset <= 0:
            raise ValueError(f"its offset is {offset!r}")
        return cls(tuple(half_lives), offset)

    def fade(self, ages_N: np.ndarray) -> np.ndarray:
        """What an event or a count of so many days ago weighs, float64 (N, J).

        Of half-lives 2 and infinity:

            ages_N     0      2        3
            returns    1 1    0.5 1    0.35 1
        """
        half_life_J = np.array(self.half_lives)
        return np.exp2(-ages_N[:, None] / half_life_J)

    def offsets(
        self, counts_NJ: np.ndarray, weights: list[float]
    ) -> np.ndarray:
        """What items' counts add to their scores, float32 (N,)."""
        x_NJ = np.log(counts_NJ + self.offset)
        offset_N = (x_NJ * np.array(weights)).sum(1)
        return offset_N.astype(np.float32)


def read_weights(entry: Record, half_lives: int) -> list[float]:
    """w of a domain's section. Raises ValueError, KeyError or TypeError."""
    _read_number("score", entry["score"])
    weights = [_read_number("weights", weight) for weight in entry["weights"]]
    if len(weights) != half_lives:
        raise ValueError(f"it has {len(weights)} weights")
    return weights


def write_offsets(
    folder: Path, counts_NJ: np.ndarray, offset_N: np.ndarray
) -> None:
    """Writes a domain's counts and offsets into its folder."""
    np.save(folder / COUNTS, np.ascontiguousarray(counts_NJ, np.float64))
    np.save(folder / OFFSETS, offset_N)


def _read_number(name: str, value: Any) -> float:
    """A finite number. Raises ValueError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"its {name} is {value!r}")
    return float(value)
