"""The logs of days that were refused: they come along with the next day, unless told otherwise.

A refused day's dataset holds the logs of the version that serves and its own. So the next day extends
that one, and each row is there once. Days named in `leave_out` do not come along, nor later:

    day    outcome       leave_out    extends    its dataset has the logs of
    1      published                  –          1
    2      refused                    1          1 2
    3      refused                    2          1 2 3
    4      published     [2]          1          1 3 4      3's logs are given again
    5                                 4          1 3 4 5

A day that was published and rolled back does not come along: somebody has decided that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.retraining.day import DAYS, Day, read_json, read_results

_EXTENDED = re.compile(rf"{DAYS}/([^/]+)/dataset")


@dataclass(frozen=True)
class CarriedLogs:
    """What comes along with a day.

    extends: the day whose dataset is extended; None where there is none. days: those whose logs
    come along. again: logs that are given once more, of those that no dataset has as is wanted.
    left_out: days that were refused and do not come along.
    """

    extends: str | None
    days: list[str]
    again: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class _RefusedDay:
    """A day that was refused. contents: the refused days whose logs its dataset has."""

    name: str
    number: int
    base: str | None
    input: list[str]
    contents: set[str]
    left_out: list[str]
    has_dataset: bool

    @classmethod
    def read(cls, folder: Path, result: dict[str, Any]) -> "_RefusedDay":
        day = Day(folder, result["name"])
        plan = read_json(day.plan)
        extends = _EXTENDED.fullmatch(plan.get("extends") or "")
        # A plan of before knows of no logs that come along: it extends its base.
        base = plan.get("base", extends and extends[1])
        carried = _names(day, plan, "carried")
        return cls(
            name=day.name,
            number=result["number"],
            base=base,
            input=_names(day, plan, "input"),
            contents={day.name, *carried},
            left_out=_names(day, plan, "left_out"),
            has_dataset=day.dataset.is_dir(),
        )


def find_carried_logs(
    folder: Path, base: dict[str, Any] | None, leave_out: Sequence[str] = ()
) -> CarriedLogs:
    """What comes along with the next day in the folder.

    base: the result of the day whose model serves. leave_out: names of refused days.

    Raises InputError where one of them was not refused here, or a record cannot be used.
    """
    results = read_results(folder)
    refused = [result for result in results if not result["published"]]
    _check_names(folder, refused, leave_out)
    base_name = None
    if base is not None:
        base_name = base["name"]
        refused = [
            result for result in refused if result["number"] > base["number"]
        ]
    days = [_RefusedDay.read(folder, result) for result in refused]
    unwanted = set(leave_out)
    for day in days:
        unwanted.update(day.left_out)
    wanted = [day for day in days if day.name not in unwanted]
    names = {day.name for day in wanted}
    extends = base_name
    has = set()
    for day in wanted:
        fits = day.base == base_name and day.contents <= names
        if fits and day.has_dataset:
            extends = day.name
            has = day.contents
    again = []
    for day in wanted:
        if day.name not in has:
            again += day.input
    return CarriedLogs(
        extends=extends,
        days=[day.name for day in wanted],
        again=again,
        left_out=[day.name for day in days if day.name in unwanted],
    )


def _check_names(
    folder: Path, refused: list[dict[str, Any]], leave_out: Sequence[str]
) -> None:
    """Raises InputError for a name that is no refused day's."""
    known = [result["name"] for result in refused]
    for name in leave_out:
        if name not in known:
            there = ", ".join(known) or "none"
            raise InputError(
                f"leave_out names {name!r}, which was not refused in {folder}: refused "
                f"are {there}"
            )


def _names(day: Day, plan: dict[str, Any], key: str) -> list[str]:
    """A list of words in a plan; an empty one where it has none. Raises InputError."""
    names = plan.get(key, [])
    if not isinstance(names, list) or not all(
        isinstance(name, str) for name in names
    ):
        raise InputError(
            f"{day.plan}: {key} is {names!r}, which no retraining here writes: remove "
            "the day's folder"
        )
    return names
