"""Staged folders: an output is there whole or not at all, and a killed preparation is resumed.

A folder is written beside its place and renamed once all that is in it is on disk (an atomic
rename). `finished_whole` does that for one folder, `new_folder` for an output without stages, and
`Work` for an output that comes to be stage by stage:

    .NAME.work/facts.json      what the output is made from and how; any change begins anew
    .NAME.work/lock            held by the process that writes here
    .NAME.work/STAGE/          what a finished stage left; STAGE.partial/ while it runs
    .NAME.work/scratch/        what does not fit into memory
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from trainer.errors import InputError
from trainer.files.atomic import flush, move_folder, write_json
from trainer.files.lock import wait_for_lock

_FACTS = "facts.json"
_LOCK = "lock"
_SHOWN = 200  # letters of a value in a message


class StagedOutput:
    """The staged work on an output, which is a new or an empty folder.

    The constructor begins the work, or resumes what a killed process left. `begun_anew` is True
    where what was left had another identity.

    Raises InputError where the output holds something or cannot be written, and where another
    process is at work on it.
    """

    def __init__(
        self,
        output: str | Path,
        identity: Any,
        fresh: bool = False,
        refuse: bool = False,
    ):
        """Locks the work folder, and empties it where it cannot be resumed.

        identity: a JSON value, on which all stages depend. fresh: begin anew whatever is there.
        refuse: raise InputError in place of beginning anew where the identity, a dict, differs; the
        message names the differences.
        """
        self.output = real_output(output)
        self.folder = work_folder(self.output)
        identity = json.loads(json.dumps(identity))
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = self._take_lock()
            self._resume_or_empty(identity, fresh, refuse)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        except OSError as error:
            raise InputError(
                f"output {output} cannot be written: {error}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._lock.close()

    @property
    def scratch(self) -> Path:
        """A folder for what does not fit into memory, emptied at the start and the end."""
        return self.folder / "scratch"

    def path(self, stage: str) -> Path:
        """The folder that a finished stage left."""
        return self.folder / stage

    def done(self, stage: str) -> bool:
        """Whether the stage is finished."""
        return self.path(stage).is_dir()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """Yields an empty folder for a stage's files; finishes the stage unless something is raised."""
        with staged_folder(self.path(name)) as folder:
            yield folder

    def deliver(self, stage: str) -> None:
        """Makes a finished stage's folder the output, and removes the work folder."""
        if self.output.is_dir():
            self.output.rmdir()
        # What is in it was flushed with the stage.
        self.path(stage).rename(self.output)
        flush(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the work folder: there is nothing to resume."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_lock(self) -> TextIO:
        lock = wait_for_lock(self.folder / _LOCK)
        if lock is None:
            raise InputError(
                f"output {self.output} is being written by another process: wait for it or stop it, "
                "and give this command again"
            )
        return lock

    def _resume_or_empty(
        self, identity: Any, fresh: bool, refuse: bool
    ) -> None:
        """Keeps the finished stages of the same identity, and begins anew otherwise."""
        file = self.folder / _FACTS
        before = _read_json(file)
        self.begun_anew = before is not None and before != identity
        if self.begun_anew and refuse and not fresh:
            self._lock.close()
            difference = _describe_difference(before, identity)
            raise InputError(
                f"output {self.output} was begun otherwise: {difference}: put it back, give "
                "another --output, or begin anew with --fresh"
            )
        if fresh or before != identity:
            self._empty()
            write_json(file, identity)

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()


def work_folder(output: Path) -> Path:
    """The folder, beside an output, in which its stages are made."""
    output = _without_link(output)
    return output.parent / f".{output.name}.work"


def real_output(output: str | Path) -> Path:
    """Returns where an output comes to be: the folder itself where it is named by a link.

    It is renamed onto that place. Raises InputError where something is there already, or where
    nothing can be renamed onto it: a mount point.
    """
    if not str(output):
        raise InputError("output is empty: name a folder")
    _require_new_or_empty(Path(output))
    real = _without_link(Path(output))
    if os.path.ismount(real):
        raise InputError(
            f"output {output} is where a volume is mounted, and cannot be put in "
            f"place at once: name a folder in it, such as {real / 'data'}"
        )
    return real


def _without_link(output: Path) -> Path:
    """Returns the folder that a link or . names; another name stays as it was given."""
    if output.is_symlink() or output.name in ("", ".."):
        return Path(os.path.realpath(output))
    return output


@contextlib.contextmanager
def staged_folder(folder: Path, writer: str = "") -> Iterator[Path]:
    """Yields an empty folder beside `folder`, and renames it to `folder` unless something is raised.

    writer: a name of this process's own, where several may write the same folder: each has a
    partial folder of its own, which is removed where it fails or another was first. That raises
    OSError, and `folder` is whole then.
    """
    if writer:
        partial = folder.with_name(f"{folder.name}.{writer}.partial")
    else:
        partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_folder(partial, folder)
    except BaseException:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_output_folder(output: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yields an empty folder beside the output, which becomes the output, and a scratch folder.

    On any failure both are removed. Raises InputError where the output already holds something, or
    cannot be written.
    """
    output = real_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}."
        ) as temporary:
            scratch = Path(temporary) / "scratch"
            scratch.mkdir()
            folder = Path(temporary) / "folder"
            folder.mkdir()
            yield folder, scratch
            move_folder(folder, output)
    except OSError as error:
        raise InputError(
            f"output {output} cannot be written: {error}"
        ) from None


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Writes a record that people read into a staged folder, as UTF-8."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _require_new_or_empty(output: Path) -> None:
    """Raises InputError where an output is a file, or a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"output {output} already holds something: name another folder or remove it"
        )


def _describe_difference(before: Any, now: dict[str, Any]) -> str:
    """Which values of an identity differ, in words."""
    if not isinstance(before, dict):
        return "it is not known how"
    differences = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        old = str(before.get(name, "not set"))[:_SHOWN]
        new = str(now.get(name, "not set"))[:_SHOWN]
        differences.append(f"{name} was {old}, is {new}")
    return "; ".join(differences)


def _read_json(file: Path) -> Any:
    """A file's JSON value; None where it is missing or unreadable."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
