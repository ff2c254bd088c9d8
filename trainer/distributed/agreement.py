"""Collective values: what the ranks agree on by an all-reduce or a broadcast of a few numbers.

While they train, the ranks' signals travel with the gradients' all-reduce of each step
(trainer/training/gradients.py): no message is added to it. Elsewhere `agree` reduces them over the
CPU's backend.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import InputError

_PAUSE = 1.0  # seconds between two collective calls while the first rank works


@dataclass(frozen=True)
class Signals:
    """What a rank signals to the others; of all ranks, what any of them signals.

    trouble: it cannot go on. stop: it was asked to stop. due: a checkpoint is due. writing: it is
    writing one.
    """

    trouble: bool = False
    stop: bool = False
    due: bool = False
    writing: bool = False

    def numbers(self) -> list[float]:
        """One number each, to be summed over ranks."""
        return [float(flag) for flag in astuple(self)]

    @classmethod
    def from_sums(cls, sums: list[float]) -> "Signals":
        """What any rank signals, from the ranks' `numbers` summed."""
        flags = [total > 0 for total in sums]
        return cls(*flags)


def reduce_signals(
    trouble: bool = False,
    stop: bool = False,
    due: bool = False,
    writing: bool = False,
) -> Signals:
    """What any rank signals. Collective.

        rank 0   reduce_signals(stop=True)
        rank 1   reduce_signals(due=True)     →    Signals(stop=True, due=True)    on both

    gloo passes a sum around all ranks, one after the other: nothing that is done in every step
    calls this.
    """
    mine = Signals(trouble, stop, due, writing)
    flags = torch.tensor(mine.numbers(), dtype=torch.float64)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return Signals.from_sums(flags.tolist())


def max_of_ranks(value: int) -> int:
    """The maximum of the ranks' values. Collective."""
    maximum = torch.tensor([value])
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)


def run_on_first_rank(work: Callable[[], Any], first: bool) -> Any:
    """Runs work() on the first rank, and gives all ranks its JSON value. Collective.

        version = run_on_first_rank(lambda: read_version(folder), ranks.first)

    An InputError of work() is raised on all ranks, with its status; any other exception on the
    first rank alone. However long work() takes, no backend gives up waiting: a collective call
    every second says that it goes on.
    """
    outcome: dict[str, Any] = {}
    thread = None
    if first:
        thread = threading.Thread(
            target=_run_work,
            args=(work, outcome),
            name="first rank",
            daemon=True,
        )
        thread.start()
        thread.join(_PAUSE)
    while max_of_ranks(int(thread is not None and thread.is_alive())):
        if thread is not None:
            thread.join(_PAUSE)
    if "fault" in outcome:
        raise outcome["fault"]
    outcome = broadcast_json(0, outcome)
    if "error" in outcome:
        error = InputError(outcome["error"])
        error.status = outcome["status"]
        raise error
    return outcome["value"]


def _run_work(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    """Writes into `outcome` what work() returns or raises."""
    try:
        outcome["value"] = work()
    except InputError as error:
        outcome["error"] = str(error)
        outcome["status"] = error.status
    except BaseException as error:
        outcome["fault"] = error


def broadcast_json(source: int, value: Any) -> Any:
    """The JSON value of the rank `source`, on all ranks. Collective.

    Each rank gives a value of its own.
    """
    text = json.dumps(value)
    encoded = list(text.encode())
    size = torch.tensor([len(encoded)])
    dist.broadcast(size, source)
    if dist.get_rank() == source:
        content = torch.tensor(encoded, dtype=torch.uint8)
    else:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, source)
    encoded = content.tolist()
    return json.loads(bytes(encoded))


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all ranks, in their order. Collective.

    rank 0   {"host": "a"}
    rank 1   {"host": "b"}    →    [{"host": "a"}, {"host": "b"}]    on both
    """
    content = json.dumps(value).encode()
    size = max_of_ranks(len(content))
    padded = content.ljust(size)  # blanks behind a value are no part of it
    mine = torch.tensor(list(padded), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    values = []
    for row in rows:
        text = bytes(row.tolist())
        values.append(json.loads(text))
    return values
