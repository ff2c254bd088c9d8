"""What hosts see of each other in the run's folder: writing, renaming, locks, and how late.

    run/.doctor-5f0c…/     made by the first rank, and removed in the end
        first              the first rank's file, which the first ranks of other hosts look for
        lock               which the first rank has locked meanwhile
        rank-3             of the first rank of another host; the first rank looks for it

Each call of a file system has a deadline: a server that is away answers never.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
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
    a file of another host is looked for. Nothing is left in the folder, and none where there was
    none.
    """
    token = uuid.uuid4().hex[:8]
    name = broadcast_json(0, f".doctor-{token}")
    scratch = run / name
    made = not run.exists()
    with contextlib.ExitStack() as locks:
        facts = FolderFacts()
        if ranks.first:
            locks.callback(_clear, scratch, made)
            problem = _problem_of(lambda: _begin(scratch, locks))
            facts = FolderFacts(problem=problem)
        has_failed = max_of_ranks(int(facts.problem != ""))
        if has_failed:
            return facts
        writer = 0
        if leads_host:
            facts = _take_part(scratch, ranks, patience)
        if leads_host and facts.seen is not None and not facts.problem:
            writer = ranks.rank
        unheard = _list_unheard(scratch, writer, ranks, patience)
    return replace(facts, heard=ranks.rank not in unheard)


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


def _clear(scratch: Path, made: bool) -> None:
    """Removes what the first rank has made; made: the run's folder is its work, too."""
    partial = _partial(scratch)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    if made:
        with contextlib.suppress(OSError):
            scratch.parent.rmdir()


def _partial(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.partial")


def _problem_of(work: Callable[[], None]) -> str:
    """Why a file system did not do its work: `Read-only file system`; "" where it did."""
    try:
        call_with_deadline(work, _SECONDS)
    except OSError as error:
        return printable_text(error.strerror or error)
    except Unanswered as error:
        return str(error)
    return ""


def _take_part(scratch: Path, ranks: Ranks, patience: float) -> FolderFacts:
    """Looks for the first rank's file, writes one, and tries the lock.

    Of a host that does not see the first rank's file, it is still told whether it can write there.
    """
    file = scratch / f"rank-{ranks.rank}"
    if ranks.first:
        problem = _problem_of(lambda: _write_twice(file))
        free = shutil.disk_usage(scratch).free
        return FolderFacts(problem=problem, free=free)
    seen = _wait_until(lambda: _can_read(scratch / _FIRST), patience)
    if seen is None:
        elsewhere = _nearest_folder(scratch) / f"{scratch.name}-{ranks.rank}"
        problem = _problem_of(lambda: _write_and_remove(elsewhere))
        return FolderFacts(problem=problem, seen=None, listed=None)
    listed = _wait_until(lambda: _FIRST in os.listdir(scratch), patience)
    problem = _problem_of(lambda: _write_twice(file))
    lock = _try_lock(scratch / _LOCK)
    return FolderFacts(problem=problem, seen=seen, listed=listed, lock=lock)


def _nearest_folder(scratch: Path) -> Path:
    """The first folder above that is there."""
    for folder in scratch.parents:
        if folder.is_dir():
            return folder
    return scratch.parent


def _write_and_remove(file: Path) -> None:
    """Writes into a folder of which it is known that it is another one."""
    write_text(file, "")
    file.unlink()


def _write_twice(file: Path) -> None:
    """Writes a file, and another over it: a rename that replaces."""
    write_text(file, "old")
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


def _list_unheard(
    scratch: Path, writer: int, ranks: Ranks, patience: float
) -> list[int]:
    """The ranks whose files the first one does not see, of those that wrote. Collective.

    writer: this rank, where it wrote; else 0. Ranks 0, 4 and 8 lead three hosts, of which the last
    one wrote elsewhere:

        rank       0  1  2  3  4  5  6  7  8  9 …
        writer     0  0  0  0  4  0  0  0  8  0 …      →    [8]    on all
    """
    writers = gather_json(writer)
    unheard = []
    if ranks.first:
        for rank in filter(None, writers):
            if not _is_heard(scratch / f"rank-{rank}", patience):
                unheard.append(rank)
                patience = 0.0  # it was waited for all of them
    return broadcast_json(0, unheard)


def _is_heard(file: Path, patience: float) -> bool:
    return _wait_until(lambda: _can_read(file), patience) is not None
