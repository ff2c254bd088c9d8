"""One retraining (a day of a nightly job) on disk: its folder, and what its stages leave there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.run_files import EXTENSION

DAYS = "days"
PUBLISHED = "published"
PLAN = "plan.json"
ARRIVALS = "arrivals.json"
RESULT = "retrain.json"
REPORT = "report.md"
# The folder of a dataset that says what came when it was extended: as
# trainer.data.prepare.extend has it, which loads a query engine.


@dataclass(frozen=True)
class Day:
    """The folder FOLDER/days/NAME of a retraining in FOLDER."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The day's own folder."""
        return self.folder / DAYS / self.name

    @property
    def published(self) -> Path:
        """The versions of all days."""
        return self.folder / PUBLISHED

    @property
    def dataset(self) -> Path:
        """The dataset with the day's logs."""
        return self.path / "dataset"

    @property
    def arrivals(self) -> Path:
        """How the model that served ranked the day's events, before it learnt from them."""
        return self.path / ARRIVALS

    @property
    def run(self) -> Path:
        """The run that is trained on it."""
        return self.path / "run"

    @property
    def trained(self) -> Path:
        """An empty file, once the run has been trained to its end."""
        return self.path / "trained"

    @property
    def plan(self) -> Path:
        """What the retraining began from."""
        return self.path / PLAN

    @property
    def result(self) -> Path:
        """How it ended; the day is done once the file is there."""
        return self.path / RESULT

    @property
    def report(self) -> Path:
        """The result in words."""
        return self.path / REPORT

    def read_extension(self) -> dict[str, Any] | None:
        """What came with the day's logs; None where its dataset extends no other."""
        file = self.dataset / EXTENSION / "extension.json"
        if not file.is_file():
            return None
        return read_json(file)


def read_results(
    folder: Path,
    *newest: dict[str, Any],
) -> list[dict[str, Any]]:
    """What every day's retrain.json says, and more such, in the order of the days.

    Raises InputError where one says that it is another folder's: folders are removed by their
    names.
    """
    results = list(newest)
    for file in folder.glob(f"{DAYS}/*/{RESULT}"):
        result = read_json(file)
        same_day = result.get("name") == file.parent.name
        if not same_day or not isinstance(result.get("number"), int):
            raise InputError(
                f"{file}: is not this day's: remove the day's folder"
            )
        results.append(result)
    results.sort(key=lambda result: result["number"])
    return results


def read_arrivals(file: Path) -> dict[str, Any]:
    """The record of a day's prequential evaluation (trainer/retraining/prequential.py).

    Raises InputError where it cannot be used.
    """
    record = read_json(file)
    skipped = isinstance(record, dict) and isinstance(
        record.get("skipped"), str
    )
    if not skipped and not _are_arrivals(record):
        raise InputError(
            f"{file}: is no record of a day's arrivals: remove it, and it is made anew"
        )
    return record


def _are_arrivals(record: Any) -> bool:
    """Whether what guards and pages take of it is there."""
    try:
        for figures in record["against_recency"].values():
            float(figures["now"] + figures["before"] + figures["users"])
            float(figures["error"] or 0.0)
        return isinstance(record["domains"], dict)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises InputError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
