"""Writes the folder of published versions (a model registry): each version whole, or not at all.

trainer/retraining/published.py draws the folder. The first rank writes; the rest call nothing here
but `Registry.hold_lock`.
"""

import contextlib
import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.retraining import PublishConfig
from trainer.data.format.dataset import File, is_inside_folder
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.files.atomic import move_folder, write_json
from trainer.files.lock import wait_for_lock
from trainer.retraining.published import read_version, version_folder
from trainer.run_files import CURRENT, LOCK, MODEL, REFUSED, VERSION, VERSIONS
from trainer.serving.example import load_encoder, plain_program
from trainer.serving.export import ENCODER
from trainer.serving.schema import SCHEMA

Record = dict[str, Any]  # of a version, or of a candidate that was refused


def roll_back(
    published: str | Path,
    to: str | None = None,
) -> Record:
    """Makes an older version the one that serves, and returns its record.

    to: its number; None: the newest version before the current one.

    Raises InputError where there is no such version, or its files are not whole.
    """
    return Registry(Path(published)).roll_back(to)


class Registry:
    """The folder of published versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def hold_lock(self, ranks: Ranks) -> Iterator[None]:
        """Within it no other process publishes here. Called on all ranks."""
        lock = None

        def lock_folder() -> None:
            nonlocal lock
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = wait_for_lock(self.folder / LOCK)
            except OSError as error:
                raise InputError(
                    f"{self.folder} cannot be written: {error.strerror}"
                ) from None
            if lock is None:
                raise InputError(
                    f"{self.folder}: another process publishes here: wait for it or "
                    "stop it"
                )

        try:
            run_on_first_rank(lock_folder, ranks.first)
            yield
        finally:
            if lock is not None:
                lock.close()

    def list_versions(self) -> list[str]:
        """The numbers of the versions that are there, as they are written, rising."""
        numbers = []
        for path in (self.folder / VERSIONS).glob("[0-9]*"):
            if path.name.isdecimal() and path.is_dir():
                numbers.append(path.name)
        return sorted(numbers, key=int)

    def partial_folder(self, number: str) -> Path:
        """Where a version comes to be."""
        return self.folder / VERSIONS / f"{number}.partial"

    def begin_version(self) -> str:
        """The next version's number; its folder is there, and empty."""
        (self.folder / VERSIONS).mkdir(exist_ok=True)
        for left in (self.folder / VERSIONS).glob("*.partial"):
            shutil.rmtree(left)
        newest = 0
        for number in self.list_versions():
            newest = int(number)
        number = f"{newest + 1:04d}"
        self.partial_folder(number).mkdir()
        return number

    def finish_version(
        self,
        record: Record,
        config: PublishConfig,
    ) -> Record:
        """Makes a version that loads the one that serves; removes the oldest ones."""
        number = record["number"]
        partial = self.partial_folder(number)
        record |= {"published": number, "time": _now()}
        write_json(partial / VERSION, record)
        check_version(partial)
        move_folder(partial, version_folder(self.folder, number))
        self.point_to(number)
        (self.folder / REFUSED).unlink(missing_ok=True)
        for old in self.list_versions()[: -1 - config.keep]:
            shutil.rmtree(version_folder(self.folder, old))
        return record

    def refuse(self, record: Record) -> Record:
        """Writes down why a candidate is not published."""
        record |= {"published": None, "time": _now()}
        write_json(self.folder / REFUSED, record)
        return record

    def point_to(self, number: str) -> None:
        """Makes a version the one that serves, in one atomic move."""
        pointer = {
            "version": number,
            "model": f"{VERSIONS}/{number}/{MODEL}",
            "since": _now(),
        }
        write_json(self.folder / CURRENT, pointer)

    def roll_back(self, to: str | None) -> Record:
        """As the function of this module."""
        versions = self.list_versions()
        known = ", ".join(versions) or "none"
        if to is None:
            to = self._version_before_current(versions)
        if to not in versions:
            raise InputError(
                f"{self.folder}: there is no version {to}: there are {known}"
            )
        try:
            record = read_version(version_folder(self.folder, to))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder}: version {to} cannot be used ({error}): name another"
            ) from None
        check_version(version_folder(self.folder, to))
        self.point_to(to)
        return record

    def _version_before_current(self, versions: list[str]) -> str:
        """The newest version that is older than the current one. Raises InputError."""
        current = self._current_number()
        older = []
        if current is not None and current.isdecimal():
            older = [
                number for number in versions if int(number) < int(current)
            ]
        if not older:
            known = ", ".join(versions) or "none"
            raise InputError(
                f"{self.folder}: there is no version before {current}: there are {known}"
            )
        return older[-1]

    def _current_number(self) -> str | None:
        """The version that current.json names, whether it is there or not."""
        try:
            text = (self.folder / CURRENT).read_text(encoding="utf-8")
            number = json.loads(text)["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return number if isinstance(number, str) else None


def check_version(version: Path) -> None:
    """Raises InputError unless a version's model is whole, and its first encoder loads.

    Every file has its checksum. Encoders hold programs, and nothing else.
    """
    folder = version / MODEL
    try:
        schema = json.loads((folder / SCHEMA).read_text(encoding="utf-8"))
        for name, entry in schema["files"].items():
            if not is_inside_folder(name):
                raise ValueError(f"{name!r} is no name of a file in it")
            path = folder / name
            exported = File(name, **entry)
            if not path.is_file() or File.of(folder, name) != exported:
                raise InputError(
                    f"{path}: is not as it was exported: publish the run again"
                )
        for file in folder.glob(f"*/{ENCODER}"):
            plain_program(file)
        load_encoder(folder / ENCODER)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: does not load ({error}): publish the run again"
        ) from None


def _now() -> str:
    """For people: UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
