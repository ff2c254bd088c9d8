"""What hosts see of each other in the run's folder: writing, renaming, locks, and how late.

run/.doctor-5f0c…/     made by the first rank, and removed in the end
    first              the first rank's file, which all others look for
    lock               which the first rank has locked meanwhile
    rank-3             of the first rank of each other host
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trainer.distributed.agreement import (
    broadcast_json,
    gather_json,
    max_of_ranks,
)
from trainer.distributed.process_group import Ranks
from trainer.doctor.deadline import Unanswered, call_with_deadline
from trainer.doctor.facts import FolderFacts
from trainer.files.atomic import write_text
from trainer.files.lock import take_lock
from trainer.files.redact import printable_text

_FIRST = "first"
_LOCK = "lock"
_SECONDS = 15.0  # that a file system has for a few calls
_PAUSE = 0.02


def examine_folder(
    run: Path, ranks: Ranks, leads_host: bool, patience: float
) -> FolderFacts:
    """The facts of this rank about the run's folder. Collective.

    leads_host: it is the first rank of its host; others look at nothing. patience: seconds in which
    a file of another host is looked for. Nothing is left in the folder, and none where there was none.
    """
    name = broadcast_json(0, f".doctor-{uuid.uuid4().hex[:8]}")
    scratch = run / name
    made = not run.exists()
    problem = ""
    with contextlib.ExitStack() as locks:
        if ranks.first:
            problem = _problem_of(lambda: _begin(scratch, locks))
        if max_of_ranks(int(problem != "")):
            _clear(scratch, made, ranks)
            return FolderFacts(problem=problem)
        facts = FolderFacts()
        if leads_host:
            facts = _take_part(scratch, ranks, patience)
        wrote = leads_host and not facts.problem and not ranks.first
        writers = gather_json(ranks.rank if wrote else None)
        unheard: list[int] = []
        if ranks.first:
            unheard = _unheard(scratch, writers, patience)
        unheard = broadcast_json(0, unheard)
    _clear(scratch, made, ranks)
    heard = ranks.rank not in unheard
    return FolderFacts(
        facts.problem, facts.seen, facts.listed, heard, facts.lock, facts.free
    )


def _clear(scratch: Path, made: bool, ranks: Ranks) -> None:
    """Removes what the first rank has made; made: the run's folder is its work, too."""
    if not ranks.first:
        return
    for folder in (scratch, _partial(scratch)):
        shutil.rmtree(folder, ignore_errors=True)
    if made:
        with contextlib.suppress(OSError):
            scratch.parent.rmdir()


def _partial(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.partial")


def _problem_of(work: Callable[[], None]) -> str:
    """ "", or why a file system did not do it."""
    try:
        call_with_deadline(work, _SECONDS)
    except (OSError, Unanswered) as error:
        reason = error
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        return printable_text(reason)
    return ""


def _begin(scratch: Path, locks: contextlib.ExitStack) -> None:
    """Makes the folder with what others look for, by the calls that a checkpoint makes."""
    partial = _partial(scratch)
    partial.mkdir(parents=True)
    os.rename(partial, scratch)
    with contextlib.suppress(OSError):  # without locks: the others say so
        lock = take_lock(scratch / _LOCK)
        if lock is not None:
            locks.enter_context(lock)
    write_text(scratch / _FIRST, "rank 0\n")


def _take_part(scratch: Path, ranks: Ranks, patience: float) -> FolderFacts:
    """Looks for the first rank's file, writes one, and tries the lock."""
    seen: float | None = 0.0
    listed: float | None = 0.0
    lock = "held"
    if not ranks.first:
        seen = _wait_until(lambda: _can_read(scratch / _FIRST), patience)
        if seen is None:
            folder = scratch.parent
            problem = _problem_of(lambda: _try_writing(folder, ranks))
            return FolderFacts(problem=problem, seen=None, listed=None)
        listed = _wait_until(lambda: _FIRST in os.listdir(scratch), patience)
    problem = _problem_of(lambda: _write_own(scratch, ranks))
    if not problem and not ranks.first:
        lock = _try_lock(scratch / _LOCK)
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(scratch).free
    return FolderFacts(problem, seen, listed, True, lock, free)


def _try_writing(folder: Path, ranks: Ranks) -> None:
    """Writes into a folder of which it is known that it is another one."""
    while not folder.exists():
        folder = folder.parent
    file = folder / f".doctor-rank-{ranks.rank}"
    write_text(file, "")
    file.unlink()


def _write_own(scratch: Path, ranks: Ranks) -> None:
    """Writes this rank's file, over one that is there: a rename that replaces."""
    file = scratch / f"rank-{ranks.rank}"
    file.write_text("old", encoding="utf-8")
    write_text(file, "new")
    if file.read_text(encoding="utf-8") != "new":
        raise OSError("a rename did not replace the file")


def _can_read(file: Path) -> bool:
    return file.read_text(encoding="utf-8") != ""


def _wait_until(look: Callable[[], bool], patience: float) -> float | None:
    """Seconds until look() is true; None where it is not within the patience."""
    begun = time.monotonic()
    while True:
        with contextlib.suppress(OSError, Unanswered):
            if call_with_deadline(look, _SECONDS):
                return time.monotonic() - begun
        if time.monotonic() - begun > patience:
            return None
        time.sleep(_PAUSE)


def _try_lock(file: Path) -> str:
    """Whether the first rank's lock holds here: "held", "free", or "none" without locks."""
    try:
        lock = call_with_deadline(lambda: take_lock(file), _SECONDS)
    except (OSError, Unanswered):
        return "none"
    if lock is None:
        return "held"
    lock.close()
    return "free"


def _unheard(
    scratch: Path, writers: list[int | None], patience: float
) -> list[int]:
    """The ranks whose files the first one does not see, of those that wrote."""
    end = time.monotonic() + patience
    unheard = []
    for rank in writers:
        if rank is None:
            continue
        file = scratch / f"rank-{rank}"
        left = max(0.0, end - time.monotonic())
        if _wait_until(lambda file=file: _can_read(file), left) is None:
            unheard.append(rank)
    return unheard
