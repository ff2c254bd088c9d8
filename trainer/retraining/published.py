"""The folder of published versions (a model registry): which version serves, and its record.

    PUBLISHED/versions/0001/model/         what launch/export.py writes, for services
    PUBLISHED/versions/0001/version.json   its run and dataset, and how well it did
    PUBLISHED/current.json                 names the version that serves; replaced in one move
    PUBLISHED/refused.json                 why the newest candidate was not published, if it was not

This page imports neither PyTorch nor an engine: a nightly job's parent process reads it.
"""

import json
import re
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.files.relocation import find_moved
from trainer.retraining.day import DAYS
from trainer.run_files import CURRENT, VERSION, VERSIONS

# Versions of before do not have them.
_ERRORS = ("candidate_error", "own_item_error")
_RECORD_TYPES = {"number": str, "run": str, "domains": dict}


def version_folder(
    published: Path,
    number: str,
) -> Path:
    """The folder of a version."""
    return published / VERSIONS / number


def read_current_version(published: Path) -> dict[str, Any] | None:
    """The version.json of the version that serves; None before the first one.

    Raises InputError where it cannot be read.
    """
    file = published / CURRENT
    if not file.is_file():
        return None
    try:
        number = json.loads(file.read_text(encoding="utf-8"))["version"]
        if not (isinstance(number, str) and re.fullmatch(r"\d+", number)):
            raise ValueError(f"{number!r} is no version's number")
        return read_version(version_folder(published, number))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be used ({error}): name a version that is there with "
            "--rollback"
        ) from None


def read_version(version: Path) -> dict[str, Any]:
    """The version.json in a version's folder, its run where it is now. Raises OSError, ValueError."""
    file = version / VERSION
    record = json.loads(file.read_text(encoding="utf-8"))
    if not _is_record(record):
        raise ValueError(f"{file} is no version's record")
    record["run"] = str(locate_run(record, version.parents[1]))
    for figures in record["domains"].values():
        if not _are_figures(figures):
            raise ValueError(f"{file}: its figures are none")
    return record


def locate_run(record: dict[str, Any], published: Path) -> Path:
    """The folder of a record's run, also where it was moved or copied with what serves.

    Of a retraining that is FOLDER/days/NAME/run beside FOLDER/published.
    """
    root = published.resolve().parent
    run = Path(record["run"])
    own = root.joinpath(*run.parts[-3:])
    if run.parts[-3:-2] == (DAYS,) and own.is_dir():
        return own
    return find_moved(record["run"], root)


def _is_record(record: object) -> bool:
    """Whether it has a version's number, its run's folder, and domains."""
    if not isinstance(record, dict):
        return False
    for name, kind in _RECORD_TYPES.items():
        if not isinstance(record.get(name), kind):
            return False
    is_number = re.fullmatch(r"\d+", record["number"]) is not None
    return is_number and record["run"].isprintable()


def _are_figures(figures: object) -> bool:
    """Whether what publishing compares with are numbers, or missing."""
    if not isinstance(figures, dict):
        return False
    for name in ("candidate", "own_item", "users", *_ERRORS):
        figure = figures.get(name)
        if figure is not None and not isinstance(figure, int | float):
            return False
    return True
