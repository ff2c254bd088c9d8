"""Settings: what is held out, what is ranked, how often, and when training stops early."""

import datetime
import math
import re
from dataclasses import dataclass
from typing import Literal

from trainer.config.setting import setting

_DAYS = re.compile(r"(\d+(?:\.\d+)?) ?d")
_MOST_DAYS = 1e6
_SECONDS_OF_DAY = 86_400


@dataclass(frozen=True)
class EvaluationConfig:
    """How held-out items are ranked, and how often."""

    negatives: int = setting(99, "drawn candidates beside the held-out item")
    batch_size: int = setting(
        512, "users that each rank has at once", on_resume=True
    )
    every_epochs: int = setting(
        1,
        "epochs between validations, which choose the best model",
        on_resume=True,
    )
    min_users: int = setting(
        50,
        "evaluated users of a domain that counts: in the mean, for the best step, in guards",
        on_resume=True,
    )
    recency_term: bool = setting(
        False,
        "rank test items by the model with its recency term, too (docs/evaluate.md)",
        on_resume=True,
    )
    patience: int = setting(
        5,
        "early stopping: validations without a better mean NDCG@10; 0: never",
        on_resume=True,
    )

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_size", "every_epochs", "min_users"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"evaluation.{name} is {value}: give at least 1"
                )
        if self.patience < 0:
            raise ValueError(
                f"evaluation.patience is {self.patience}: give 0 (never stop early) or more"
            )


@dataclass(frozen=True)
class Share:
    """A share of all events, between 0 and 1."""

    value: float


@dataclass(frozen=True)
class Days:
    """A number of days."""

    value: float

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.value * _SECONDS_OF_DAY


@dataclass(frozen=True)
class Moment:
    """A moment, in seconds since 1970 (UTC)."""

    seconds: float


Window = Share | Days | Moment


@dataclass(frozen=True)
class SplitConfig:
    """Which events are held out for validation and test."""

    kind: Literal["leave_one_out", "timeline"] = setting(
        "leave_one_out",
        "leave_one_out: each user's newest two; timeline: all that comes after a moment",
        unrecorded="leave_one_out",
    )
    validation: str = setting(
        "0.1",
        "timeline: 0.1, the tenth of events before the test's; 7d, days; or the first date",
        unrecorded="0.1",
    )
    test: str = setting(
        "0.1",
        "timeline: 0.1, the last tenth of all events; 7d, the last days; or the first date",
        unrecorded="0.1",
    )
    whose: Literal["first", "newest", "all"] = setting(
        "first",
        "timeline: which of a user's events in the validation and test time are ranked",
        unrecorded="first",
    )
    counts: Literal["cut", "day"] = setting(
        "cut",
        "timeline: the recent past is counted as of the cut, or as of each event's day",
        unrecorded="cut",
    )

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            parse_window(f"split.{name}", getattr(self, name))


def parse_window(key: str, text: str) -> Window:
    """Reads a share, a number of days or a date. key: of the setting, for the message.

        0.1                 Share(0.1)
        7d                  Days(7)
        2014-07-01          Moment(1404172800)
        2014-07-01T12:00    Moment(1404216000)

    Raises ValueError for anything else.
    """
    days = _DAYS.fullmatch(text)
    if days is not None:
        value = float(days[1])
        if not 0 < value <= _MOST_DAYS:
            raise ValueError(f"{key} is {text}: give more than 0 days")
        return Days(value)
    try:
        share = float(text)
    except ValueError:
        return _parse_date(key, text)
    if not (math.isfinite(share) and 0 < share < 1):
        raise ValueError(
            f"{key} is {text}: a share of the events is above 0 and below 1"
        )
    return Share(share)


def _parse_date(key: str, text: str) -> Moment:
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{key} is {text!r}: give a share of the events (0.1), days (7d) or a date "
            "(2014-07-01)"
        ) from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return Moment(date.timestamp())
