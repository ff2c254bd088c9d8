"""What the ranks agree on: to go on, to save, to stop, or that one of them cannot go on.

While they train, the ranks' signals travel with the sums of each step (trainer/training/gradients.py): no message is
added to it. Elsewhere `agree` reduces a few integers over the CPU's backend.
"""

import contextlib
import json
import re
import signal
import sys
import threading
import time
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from trainer.distributed.launchers import rank_for_messages
from trainer.distributed.process_exit import end_process
from trainer.errors import LOST, InputError, RanksLost

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Signals:
    """What a rank tells the others: it cannot go on; it was asked to stop; a checkpoint is due; it
    is writing one. Of all ranks: what any of them told."""

    trouble: bool = False
    stop: bool = False
    due: bool = False
    writing: bool = False

    def numbers(self) -> list[float]:
        """One number each, to be summed over ranks."""
        return [float(signal) for signal in astuple(self)]

    @classmethod
    def of_sums(cls, sums: list[float]) -> "Signals":
        """What any rank told, from the ranks' `numbers` summed."""
        return cls(*(total > 0 for total in sums))


def agree(trouble=False, stop=False, due=False, writing=False) -> Signals:
    """What any rank tells. Called on all ranks at the same place.

    gloo passes a sum around all ranks, one after the other: nothing that is done in every step calls this.
    """
    values = torch.tensor(
        Signals(trouble, stop, due, writing).numbers(), dtype=torch.float64
    )
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return Signals.of_sums(values.tolist())


def largest(value: int) -> int:
    """The largest of the ranks' values. Called on all ranks at the same place."""
    found = torch.tensor([value])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def by_the_first(work, first: bool):
    """What work() returns on the first rank (a JSON value), or the InputError that it raises, on all ranks. They all call it.

    However long it takes, no backend gives up waiting: the others are told every second that it goes on.
    """
    outcome = {}

    def run():
        try:
            outcome["value"] = work()
        except InputError as error:
            outcome["refused"] = str(error)
            outcome["status"] = error.status
        except BaseException as error:
            outcome["failed"] = error

    thread = (
        threading.Thread(target=run, name="first rank", daemon=True) if first else None
    )
    if thread:
        thread.start()
        thread.join(1.0)
    while largest(int(first and thread.is_alive())):
        if thread:
            thread.join(1.0)
    if "failed" in outcome:
        raise outcome["failed"]
    told = told_by(0, outcome)
    if "refused" in told:
        error = InputError(told["refused"])
        error.status = told["status"]
        raise error
    return told["value"]


def told_by(rank: int, value):
    """The JSON value of one rank, on all of them. Called on all ranks, each with a value of its own."""
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    dist.broadcast(size, rank)
    if dist.get_rank() != rank:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, rank)
    return json.loads(bytes(content.tolist()))


class StopSignal:
    """Within it, SIGTERM and SIGUSR1 (what schedulers send before they kill) and SIGINT (Ctrl-C) are noted in place of ending
    the process. A second SIGINT interrupts it: who presses Ctrl-C again does not want to wait for a checkpoint."""

    def __init__(self):
        self.asked = False
        self._interrupted = False

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note) for number in _SIGNALS
            }
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = True


class Watchdog:
    """Ends this process where `beat` is not called for so long: a collective that another rank or host left waits for ever on
    some backends, and DeepSpeed's own groups wait half an hour whatever the configuration says."""

    def __init__(self, seconds, what):
        self._seconds, self._what = seconds, what
        self._beaten, self._held, self._ended = time.monotonic(), 0, threading.Event()

    def __enter__(self):
        self.beat()
        self._thread = threading.Thread(
            target=self._watch, daemon=True, name="watchdog"
        )
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()

    def beat(self):
        """There was progress."""
        self._beaten = time.monotonic()

    @contextlib.contextmanager
    def held(self):
        """No progress is expected in here (a report is drawn, a disk is written)."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self.beat()

    def _watch(self):
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            waited = time.monotonic() - self._beaten
            if not self._held and waited > self._seconds:
                where = f"rank {rank_for_messages()}: no progress for {waited:.0f} s in {self._what()}"
                print(f"error: {where}: {LOST}", file=sys.stderr, flush=True)
                end_process(RanksLost.status)


# gloo's errors have no class of their own, and reach Python from inside a backward too: each names its source file first. These
# are the sentences of gloo/transport/tcp (pair.cc, unbound_buffer.cc, error.cc, loop.cc) and gloo/rendezvous/context.cc for a
# peer that is gone or does not answer. Others, such as a size that is not the peer's, are faults. A wait that ends because
# another link was given up says its sentence without a source file.
_GLOO_SAYS = re.compile(
    r"^Application timeout caused pair closure$|"
    r"^\[\S*\.(?:cc|h):\d+\]\s.*("
    r"connection closed by peer|connection reset|connection refused|broken pipe|socket closed|socket not connected|"
    r"pair closure|timed out|connect timeout|no route to host|network is (?:unreachable|down)|host is down|"
    r"connectFullMesh failed)",
    re.IGNORECASE | re.DOTALL,
)
_BACKEND_LOST = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
_PREFIX = re.compile(r"^\[\S*\.(?:cc|cpp|h|hpp):\d+\]\s*")


@contextlib.contextmanager
def ranks_lost():
    """What a backend raises where its peers are gone becomes one line, with what was raised as its cause."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (
            isinstance(error, _BACKEND_LOST)
            or (type(error) is RuntimeError and _GLOO_SAYS.match(text))
        ):
            raise
        reason = " ".join(_PREFIX.sub("", text).split())[:160]
        raise RanksLost(
            f"rank {rank_for_messages()}: lost the others ({reason}): {LOST}",
            one_rank=True,
        ) from error
