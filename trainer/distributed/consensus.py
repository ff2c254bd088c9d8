"""Consensus of the ranks at the start of a run: each can use its inputs, and all have the same.

Something may be wrong on one rank or host alone: a dataset that is not mounted there, another copy
of it, another version of a library. All ranks then end with one line that names it. Otherwise the
others would wait in a collective, or train on a mixture. A few fixed-size numbers of each rank are
gathered; text is broadcast only by ranks that have something to say.
"""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.distributed.agreement import broadcast_json, max_of_ranks
from trainer.errors import InputError, LostRanks
from trainer.files.atomic import LateStorage, Patience, is_transient

T = TypeVar("T")
_Values = dict[str, Any]  # JSON values by their names

_NAMED = 4  # ranks, and differences of one of them, that a message names
_LENGTH = 90  # letters of a value in a message
_OTHERS_SAY = (
    "its own lines say why; the same command goes on from the last checkpoint"
)


@dataclass(frozen=True)
class _Failure:
    """Why work failed on this rank; status 0: it did not.

    fault: an exception that is no InputError and no OSError.
    """

    status: int = 0
    text: str = ""
    fault: Exception | None = None


@dataclass(frozen=True)
class _Comparison:
    """How the ranks' values of one group compare. usual_rank: a rank that has what most have."""

    name: str
    usual_rank: int
    odd_ranks: list[int]


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """What work() returns, once it has succeeded on all ranks. Collective; work itself is not.

        dataset = run_on_all_ranks(lambda: open_dataset(folder))

    Where work raises an InputError or an OSError on some ranks, all ranks raise the same
    InputError, which names these ranks and their hosts:

        rank 3 on host1 and 2 more: /data: is not there; rank 6 on host2: /data: another copy

    Any other exception is raised by the rank that meets it, and LostRanks by the others.
    """
    outcome: Any = None
    failure = _Failure()
    try:
        outcome = work()
    except InputError as error:
        failure = _Failure(error.status, str(error))
    except OSError as error:
        failure = _failure_of_storage(error)
    except Exception as error:
        kind = type(error).__name__
        text = f"failed ({kind}): {_OTHERS_SAY}"
        failure = _Failure(LostRanks.status, text, error)
    statuses, digests = _gather_failures(failure)
    failed_ranks = []
    for rank, status in enumerate(statuses):
        if status:
            failed_ranks.append(rank)
    if not failed_ranks:
        return outcome
    joined = _join_failures(failure, failed_ranks, statuses, digests)
    if failure.fault is not None:
        raise failure.fault
    raise joined


def _failure_of_storage(error: OSError) -> _Failure:
    """A failure that another attempt may not meet, or one that it will."""
    status = InputError.status
    if is_transient(error.errno):
        status = LateStorage.status
    file = error.filename or "storage"
    reason = error.strerror or error
    return _Failure(status, f"{file}: {reason}")


def _gather_failures(failure: _Failure) -> tuple[list[int], list[int]]:
    """The ranks' statuses, and the digests of their texts. Collective.

    Three ranks, of which the last two fail with one text:

        [0, 2, 2], [4831…, 9076…, 9076…]
    """
    rows = _gather_numbers([failure.status, _digest(failure.text)])
    statuses = []
    digests = []
    for status, digest in rows:
        statuses.append(status)
        digests.append(digest)
    return statuses, digests


def _join_failures(
    failure: _Failure,
    failed_ranks: list[int],
    statuses: list[int],
    digests: list[int],
) -> InputError:
    """One error of all ranks' failures. Collective.

    failure: this rank's. The lowest rank of each text broadcasts it; what all ranks meet is said
    without names.
    """
    speakers: dict[int, int] = {}  # by digest
    for rank in failed_ranks:
        speakers.setdefault(digests[rank], rank)
    mine = {"host": socket.gethostname(), "text": failure.text}
    said_by_rank: dict[int, _Values] = {}
    named_ranks = sorted(speakers.values())[:_NAMED]
    for rank in named_ranks:
        said_by_rank[rank] = broadcast_json(rank, mine)
    first = failed_ranks[0]
    error_class = _error_class(statuses[first])
    all_failed = len(failed_ranks) == len(statuses)
    if all_failed and len(speakers) == 1:
        return error_class(said_by_rank[first]["text"])
    lines = []
    for rank, said in said_by_rank.items():
        who = f"rank {rank} on {said['host']}"
        more = digests.count(digests[rank]) - 1
        if more:
            who += f" and {more} more"
        lines.append(f"{who}: {said['text']}")
    return error_class("; ".join(lines))


def _error_class(status: int) -> type[InputError]:
    """The error of an exit status, as far as a restart depends on it."""
    for error_class in (LateStorage, LostRanks):
        if error_class.status == status:
            return error_class
    return InputError


def require_same_on_all_ranks(groups: dict[str, _Values]) -> None:
    """Raises InputError on all ranks where some have other values than most of them. Collective.

    The message names these ranks, their hosts and what differs:

        rank 3 on host1 has other settings (seed 2, rank 0 on host0 has 1): give all ranks the same

    groups: JSON values by their names, grouped under what a difference is called in a message:

        {"another dataset": {"fingerprint": "5f0c…"}, "other settings": {"seed": 1, "dim": 64}}
    """
    groups = json.loads(json.dumps(groups))
    comparisons = _compare_groups(groups)
    usual_ranks = set()
    odd_ranks = set()
    for comparison in comparisons:
        usual_ranks.add(comparison.usual_rank)
        odd_ranks.update(comparison.odd_ranks)
    if not odd_ranks:
        return
    named_ranks = sorted(odd_ranks)[:_NAMED]
    mine = {"host": socket.gethostname(), "groups": groups}
    told_by_rank: dict[int, _Values] = {}
    for rank in sorted(usual_ranks.union(named_ranks)):
        told_by_rank[rank] = broadcast_json(rank, mine)
    lines = []
    for rank in named_ranks:
        for comparison in comparisons:
            if rank in comparison.odd_ranks:
                line = _describe_comparison(comparison, rank, told_by_rank)
                lines.append(line)
    more = len(odd_ranks) - _NAMED
    if more > 0:
        lines.append(f"and {more} more ranks")
    differences = "; ".join(lines)
    raise InputError(f"{differences}: give all ranks the same")


def _compare_groups(groups: dict[str, _Values]) -> list[_Comparison]:
    """Compares each group over the ranks by a digest of its values. Collective."""
    mine = []
    for values in groups.values():
        text = json.dumps(values, sort_keys=True)
        mine.append(_digest(text))
    rows = _gather_numbers(mine)
    comparisons = []
    for column, name in enumerate(groups):
        digests = [row[column] for row in rows]
        usual_rank = _usual_rank(digests)
        odd_ranks = []
        for rank, digest in enumerate(digests):
            if digest != digests[usual_rank]:
                odd_ranks.append(rank)
        comparison = _Comparison(name, usual_rank, odd_ranks)
        comparisons.append(comparison)
    return comparisons


def _usual_rank(digests: list[int]) -> int:
    """The lowest rank that has what most ranks have: of digests 7, 5, 5 it is rank 1.

    Of equally many, what the lowest rank has counts.
    """
    counts = Counter(digests)
    usual, _ = counts.most_common(1)[0]
    return digests.index(usual)


def _describe_comparison(
    comparison: _Comparison,
    rank: int,
    told_by_rank: dict[int, _Values],
) -> str:
    """`rank 3 on host1 has other settings (seed 2, rank 0 on host0 has 1)`.

    told_by_rank: host and groups of each rank that is named.
    """
    name = comparison.name
    odd = told_by_rank[rank]
    usual = told_by_rank[comparison.usual_rank]
    other = f"rank {comparison.usual_rank} on {usual['host']}"
    odd_values = odd["groups"][name]
    usual_values = usual["groups"][name]
    difference = _describe_difference(odd_values, usual_values, other)
    return f"rank {rank} on {odd['host']} has {name} ({difference})"


def _describe_difference(
    mine: _Values,
    theirs: _Values,
    other: str,
) -> str:
    """`seed 2, rank 0 on host0 has 1; dim 8, …`, of at most _NAMED values.

    other: the rank that has `theirs`.
    """
    names = mine.keys() | theirs.keys()
    differences = []
    for name in sorted(names):
        if mine.get(name) == theirs.get(name):
            continue
        my_value = _shorten(mine.get(name, "not set"))
        their_value = _shorten(theirs.get(name, "not set"))
        differences.append(f"{name} {my_value}, {other} has {their_value}")
    parts = differences[:_NAMED]
    more = len(differences) - _NAMED
    if more > 0:
        parts.append(f"and {more} more")
    return "; ".join(parts)


def _shorten(value: Any) -> str:
    """A value as a message has it."""
    text = str(value)
    return text[:_LENGTH]


def wait_until_all_see(
    look: Callable[[], str | None],
    patience: Patience,
    beat: Callable[[], None] = lambda: None,
) -> str | None:
    """Waits until look() returns None on every rank, and returns None then. Collective.

        unseen = all_see(lambda: missing_file(folder), Patience(folder))

    Where time is up before, it returns what look() said on this rank, "" where that was None.

    look: says what this rank does not see yet; one that sees all is not asked again. beat: called
    between two looks.
    """
    unseen: str | None = ""
    while True:
        if unseen is not None:
            unseen = look()
        if not is_true_on_any_rank(unseen is not None):
            return None
        is_first = dist.get_rank() == 0
        if is_true_on_any_rank(is_first and patience.over):
            return unseen or ""
        beat()
        patience.wait()


def is_true_on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(max_of_ranks(int(flag)))


def _gather_numbers(numbers: list[int]) -> list[list[int]]:
    """All ranks' integers, a row a rank. Collective; each gives as many.

    rank 0   [1, 2]
    rank 1   [3, 4]    →    [[1, 2], [3, 4]]    on both
    """
    mine = torch.tensor(numbers, dtype=torch.int64)
    ranks = dist.get_world_size()
    rows = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def _digest(text: str) -> int:
    """63 bits of a text."""
    content = text.encode()
    digest = hashlib.sha256(content).digest()
    first_64 = int.from_bytes(digest[:8], "big")
    return first_64 >> 1
