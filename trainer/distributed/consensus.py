"""Where the ranks meet at the start: all of them can use what they were given, and it is the same
on all of them.

What only one rank or host meets (a dataset that is not mounted there, another copy of it, another
version of a library) ends all ranks with one line that names it, in place of leaving the others in
a collective, or of training on a mixture. A few fixed-size numbers of each rank are gathered; words
are sent by those alone that have something to say."""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.distributed.agreement import largest, told_by
from trainer.errors import InputError, RanksLost
from trainer.files.atomic import Patience, StorageLate, passes

T = TypeVar("T")

_NAMED = 4  # ranks, and differences of one of them, that a message names
_LENGTH = 90  # letters of a value in a message
_OTHERS_SAY = "its own lines say why; the same command goes on from the last checkpoint"


def on_all_ranks(work: Callable[[], T]) -> T:
    """What work() returns, once it has succeeded on all ranks. They all call it; work itself talks
    to no other rank.

    Where it raises an InputError or an OSError on some, all of them raise the same InputError,
    which names these ranks and their hosts. Any other exception is raised by the rank that meets
    it, and RanksLost by the others."""
    outcome, trouble, fault = None, None, None
    try:
        outcome = work()
    except InputError as error:
        trouble = (error.status, str(error))
    except OSError as error:
        status = StorageLate.status if passes(error.errno) else InputError.status
        trouble = (status, f"{error.filename or 'storage'}: {error.strerror or error}")
    except Exception as error:
        fault = error
        trouble = (RanksLost.status, f"failed ({type(error).__name__}): {_OTHERS_SAY}")
    status, text = trouble or (0, "")
    rows = _gathered([status, _digest(text)])
    failed = [rank for rank, (code, _) in enumerate(rows) if code]
    if not failed:
        return outcome
    first_of = {
        digest: rank
        for rank, (_, digest) in reversed(list(enumerate(rows)))
        if rank in failed
    }
    telling = sorted(first_of.values())[:_NAMED]
    told = [
        told_by(rank, {"host": socket.gethostname(), "text": text}) for rank in telling
    ]
    if fault is not None:
        raise fault
    kind = {StorageLate.status: StorageLate, RanksLost.status: RanksLost}.get(
        rows[failed[0]][0], InputError
    )
    if len(first_of) == 1 and len(failed) == len(rows):
        raise kind(told[0]["text"])
    lines = []
    for rank, said in zip(telling, told, strict=True):
        more = sum(digest == rows[rank][1] for _, digest in rows) - 1
        others = f" and {more} more" if more else ""
        lines.append(f"rank {rank} on {said['host']}{others}: {said['text']}")
    raise kind("; ".join(lines))


def require_same(facts: dict[str, dict]) -> None:
    """Raises InputError on all ranks where some have other facts than most of them, and names the
    ranks, their hosts and what differs. Called on all ranks.

    facts: by what it is called in a message ("another dataset"), values by their names, as JSON has
    them."""
    facts = json.loads(json.dumps(facts))
    rows = _gathered(
        [_digest(json.dumps(part, sort_keys=True)) for part in facts.values()]
    )
    columns = list(zip(*rows, strict=True))
    usual = [_usual(column) for column in columns]
    expected = [column[rank] for column, rank in zip(columns, usual, strict=True)]
    odd = [rank for rank, row in enumerate(rows) if row != expected]
    if not odd:
        return
    hosted = {"host": socket.gethostname(), "facts": facts}
    told = {rank: told_by(rank, hosted) for rank in sorted({*odd[:_NAMED], *usual})}
    lines = []
    for rank in odd[:_NAMED]:
        for number, name in enumerate(facts):
            if rows[rank][number] == expected[number]:
                continue
            other = f"rank {usual[number]} on {told[usual[number]]['host']}"
            mine = told[rank]["facts"][name]
            theirs = told[usual[number]]["facts"][name]
            lines.append(
                f"rank {rank} on {told[rank]['host']} has {name} ({_difference(mine, theirs, other)})"
            )
    more = f"; and {len(odd) - _NAMED} more ranks" if len(odd) > _NAMED else ""
    raise InputError(f"{'; '.join(lines)}{more}: give all ranks the same")


def all_see(
    look: Callable[[], str | None],
    patience: Patience,
    beat: Callable[[], None] = lambda: None,
) -> str | None:
    """None once look() says None on every rank; where time is up before, what it says on this one,
    "" where that is nothing. Called on all ranks, which go on together; beat: called between two
    looks.

    look: says what is not seen yet. A rank that has seen it looks no more.
    """
    unseen = ""
    while True:
        if unseen is not None:
            unseen = look()
        if not on_any_rank(unseen is not None):
            return None
        if on_any_rank(patience.over and dist.get_rank() == 0):
            return unseen or ""
        beat()
        patience.wait()


def on_any_rank(flag: bool) -> bool:
    """Whether it is so on any rank. Called on all ranks."""
    return bool(largest(int(flag)))


def _gathered(numbers):
    """All ranks' integers, a row a rank."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def _digest(text):
    """63 bits of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _usual(column):
    """The lowest rank that has what most ranks have; of equally many, what the lowest rank has."""
    counts = Counter(column)
    most = max(counts.values())
    return next(rank for rank, value in enumerate(column) if counts[value] == most)


def _difference(mine, theirs, other):
    names = [
        name
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    parts = [
        f"{name} {str(mine.get(name, 'not set'))[:_LENGTH]}, {other} has {str(theirs.get(name, 'not set'))[:_LENGTH]}"
        for name in names[:_NAMED]
    ]
    return "; ".join(parts) + (
        f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    )
