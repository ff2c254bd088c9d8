"""The folder beside an output in which it comes to be, stage by stage: what a killed preparation goes on from.

.NAME.work/facts.json      what it is made from and how; other facts begin anew
.NAME.work/lock            held by the process that writes here
.NAME.work/STAGE/          what a finished stage left; STAGE.partial/ while it runs
.NAME.work/scratch/        what does not fit into memory
"""

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

from trainer.errors import InputError
from trainer.files.atomic import flush, move_folder, write_json


class Work:
    """Begins or goes on with the work on `output`, which is a new or an empty folder.

    facts: JSON values on which the stages depend. fresh: begin anew whatever is there. `begun_anew` says that what was
    there was made from other facts; with `refuse` that raises InputError, which names the facts (of a dict) that differ. It is
    raised, too, where the output holds something or cannot be written, or another process is at it.
    """

    def __init__(self, output, facts, fresh=False, refuse=False):
        self.output = Path(output)
        self.folder = work_folder(self.output)
        if self.output.exists() and (
            not self.output.is_dir() or any(self.output.iterdir())
        ):
            raise InputError(
                f"output {output} already holds something: name another folder or remove it"
            )
        facts = json.loads(json.dumps(facts))
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = self._locked()
            path = self.folder / "facts.json"
            known = _read(path)
            self.begun_anew = known not in (None, facts)
            if self.begun_anew and refuse and not fresh:
                self._lock.close()
                raise InputError(
                    f"output {output} was begun otherwise: {_difference(known, facts)}: put it back, give another --output, or "
                    "begin anew with --fresh"
                )
            if fresh or known != facts:
                self._empty()
                write_json(path, facts)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        except OSError as error:
            raise InputError(f"output {output} cannot be written: {error}") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._lock.close()

    @property
    def scratch(self) -> Path:
        """For what does not fit into memory; emptied at the start and the end."""
        return self.folder / "scratch"

    def path(self, stage) -> Path:
        """The folder that a finished stage left."""
        return self.folder / stage

    def done(self, stage) -> bool:
        """Whether the stage has been finished."""
        return self.path(stage).is_dir()

    @contextlib.contextmanager
    def stage(self, name):
        """Yields an empty folder for a stage's files, and makes the stage done where nothing is raised."""
        with finished_whole(self.path(name)) as folder:
            yield folder

    def deliver(self, stage):
        """Makes a finished stage's folder the output, and takes the rest away."""
        if self.output.is_dir():
            self.output.rmdir()
        self.path(stage).rename(self.output)  # what is in it was flushed with the stage
        flush(self.output.parent)
        self.discard()

    def discard(self):
        """Takes everything away: there is nothing to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _locked(self):
        lock = exclusive(self.folder / "lock")
        if lock is None:
            raise InputError(
                f"output {self.output} is being written by another process: wait for it or stop it"
            )
        return lock

    def _empty(self):
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


def exclusive(file: Path):
    """The file opened and locked until it is closed, or its process ends; None where another process has it."""
    lock = open(file, "w")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def work_folder(output: Path) -> Path:
    """Where the work on an output is done."""
    return output.parent / f".{output.name}.work"


@contextlib.contextmanager
def finished_whole(folder: Path, writer=""):
    """Yields an empty folder `folder`.partial, which gets its name where nothing is raised.

    writer: its name, where several may write the same: each has a partial folder of its own, which is taken away where it
    fails or another was first. That raises OSError, and `folder` is whole then.
    """
    partial = folder.with_name(f"{folder.name}{writer and '.'}{writer}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_folder(partial, folder)
    except BaseException:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _difference(known, facts):
    """What is not as it was, in words."""
    if not isinstance(known, dict):
        return "it is not known how"
    return "; ".join(
        f"{name} was {str(known.get(name, 'not set'))[:200]}, is {str(facts.get(name, 'not set'))[:200]}"
        for name in sorted(known.keys() | facts.keys())
        if known.get(name) != facts.get(name)
    )


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
