"""Begins a command again where it fails, on all ranks together.

Each rank's process supervises a child that does the work. A launcher sees nothing when a child
dies, so the supervisors tell each other: they are connected with the first rank's, at the port
after the rendezvous's. Where one child ends before its time the others are ended too, whatever they
wait for; when all are gone, all begin the next attempt, or none does.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from trainer.distributed.json_lines import (
    Connection,
    connect,
    in_background,
    listen,
    serve,
)
from trainer.distributed.launchers import World, enter_world, read_world, sign
from trainer.errors import InputError, NotFinite, RanksLost, Stopped

_THREAD = "supervisor"
_UNDER_SUPERVISION = "SYNCREC_UNDER_SUPERVISION"
_SUPERVISOR = "SYNCREC_SUPERVISOR"  # its process number
_NOT_AGAIN = {
    InputError.status,
    NotFinite.status,
    Stopped.status,
}  # the same would come of it
_BY_ITSELF = 20.0  # seconds in which a child ends after another one has
_MEET = 600.0  # seconds in which all supervisors are started
_TRY = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def supervise(max_restarts: int, pause: float = 2.0) -> None:
    """Runs this very command as a child, and again where it fails, up to `max_restarts` times; ends
    this process with the last child's status, 128 + n where signal n ended it. In the child it
    returns.

    Under a launcher each rank's process does so for itself, and all know of each other. pause:
    seconds before the next attempt.
    """
    if os.environ.get(_UNDER_SUPERVISION):
        if _SUPERVISOR in os.environ:
            _die_with(int(os.environ[_SUPERVISOR]))
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "--max-restarts: torchrun restarts by itself, give it to torchrun (before the "
            "script's name)"
        )
    supervised = _Supervised()
    for number in _SIGNALS:
        signal.signal(number, supervised.pass_on)
    world = read_world()
    enter_world(world)
    peers = _meet(world, supervised)
    arguments = [
        argument for argument in sys.argv[1:] if argument != "--fresh"
    ]  # its own attempts are to be gone on with
    for attempt in range(max_restarts + 1):
        status = supervised.run(attempt, sys.argv[1:] if attempt == 0 else arguments)
        last = supervised.stopped or attempt == max_restarts
        again = peers.finish(attempt, status, last)
        if not again:
            break
        how = f"signal {-status}" if status < 0 else f"status {status}"
        again = f"restart {attempt + 1} of {max_restarts}"
        print(
            f"rank {world.rank}: ended with {how}; {again} in {pause:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(pause)
        if (
            supervised.stopped
        ):  # the others begin, and are not left waiting for this one
            peers.finish(attempt + 1, status, True)
            break
    peers.close()
    sys.exit(status if status >= 0 else 128 - status)


class _Supervised:
    """The child of this process, of which there is one after another."""

    def __init__(self):
        self.stopped = False
        self._child: subprocess.Popen | None = None
        self._attempt = -1
        self._over = -1  # the last attempt that has ended somewhere
        self._lock = threading.RLock()  # a signal's handler may come while it is held

    def run(self, attempt: int, arguments: list[str]) -> int:
        """Starts the child of this attempt and waits for its end; its status, negative for a
        signal."""
        with self._lock:
            self._attempt = attempt
            command = [sys.executable, sys.argv[0], *arguments]
            # In a group of its own: what a terminal sends to all (Ctrl-C) comes once, from here.
            environment = os.environ | {
                _UNDER_SUPERVISION: "1",
                _SUPERVISOR: str(os.getpid()),
            }
            child = subprocess.Popen(command, env=environment, process_group=0)
            self._child = child
            if self.stopped:  # asked between two lines
                child.terminate()
            if self._over >= attempt:
                in_background(lambda: self._end(child), _THREAD)
        return child.wait()

    def end_attempt(self, attempt: int) -> None:
        """Another child of this attempt has ended: this one ends by itself, or is killed."""
        with self._lock:
            self._over = max(self._over, attempt)
            child = self._child if self._attempt == attempt else None
        if child is not None:
            in_background(lambda: self._end(child), _THREAD)

    def pass_on(self, number, frame):
        """A signal's handler."""
        self.stopped = True
        if self._child is not None:
            self._child.send_signal(number)

    def _end(self, child):
        end = time.monotonic() + _BY_ITSELF
        while child.poll() is None and time.monotonic() < end:
            time.sleep(_TRY)
        if child.poll() is None:
            print(
                f"{sign()}: another rank has ended, and this one does not: it is killed",
                file=sys.stderr,
                flush=True,
            )
            child.kill()


class _Alone:
    """The one supervisor of a world of one."""

    def finish(self, attempt: int, status: int, last: bool) -> bool:
        """This rank's child has ended; whether all begin again, once all have ended."""
        return not (last or status == 0 or status in _NOT_AGAIN)

    def close(self) -> None:
        """No attempt follows."""


class _First(_Alone):
    """The first rank's: hears from all and decides."""

    def __init__(self, world: World, supervised: _Supervised):
        self._size = world.size
        self._supervised = supervised
        self._members: dict[int, Connection] = {}
        self._ends: dict[
            int, dict[int, tuple[int, bool]]
        ] = {}  # attempt: rank: (status, no other may follow)
        self._gone: str | None = None
        self._changed = threading.Condition()
        try:
            self._listener = listen(world.port + 1, world.size)
        except OSError as error:
            raise InputError(
                f"port {world.port + 1} on {socket.gethostname()} is in use ({error.strerror}): "
                "--max-restarts takes the port after MASTER_PORT; give another MASTER_PORT "
                "(deepspeed --master_port)"
            ) from None
        serve(self._listener, self._hear, _THREAD)

    def finish(self, attempt, status, last):
        self._note(0, attempt, status, last)
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._ends[attempt]) == self._size or self._gone
            )
            ends = self._ends[attempt].values()
            again = not (
                self._gone
                or all(one == 0 for one, _ in ends)
                or any(one in _NOT_AGAIN for one, _ in ends)
                or any(final for one, final in ends)
            )
            members = list(self._members.values())
        if self._gone:
            print(
                f"error: {self._gone}: begin again by hand", file=sys.stderr, flush=True
            )
        for member in members:
            member.send(attempt=attempt, again=again)
        return again

    def close(self):
        self._listener.close()

    def _note(self, rank, attempt, status, final):
        with self._changed:
            ends = self._ends.setdefault(attempt, {})
            ends[rank] = (status, final)
            members = list(self._members.values())
            self._changed.notify_all()
        if status != 0:
            self._end_all(attempt, members)

    def _end_all(self, attempt, members):
        for member in members:
            member.send(attempt=attempt, over=True)
        self._supervised.end_attempt(attempt)

    def _hear(self, member):
        lines = member.lines()
        hello = next(lines, {})
        if hello.get("size") != self._size or hello.get("rank") in self._members:
            member.close()  # of another run
            return
        rank, host, attempt = int(hello["rank"]), str(hello["host"]), 0
        with self._changed:
            self._members[rank] = member
            over = [
                attempt
                for attempt, ends in self._ends.items()
                if any(status for status, _ in ends.values())
            ]
        member.send(welcome=True)
        for attempt in over:
            member.send(attempt=attempt, over=True)
        for message in lines:
            if message.get("through"):
                return
            self._note(
                rank,
                int(message["attempt"]),
                int(message["status"]),
                bool(message["final"]),
            )
        with self._changed:
            self._gone = f"the supervisor of rank {rank} on {host} is gone"
            members = [one for one in self._members.values() if one is not member]
            attempt = max(self._ends, default=0)
            self._changed.notify_all()
        for number in (attempt, attempt + 1):
            self._end_all(number, members)


class _Other(_Alone):
    """Any other rank's: says how its child ended and does as the first one says."""

    def __init__(self, world: World, supervised: _Supervised):
        self._world = world
        self._supervised = supervised
        self._verdicts: dict[int, bool] = {}
        self._lost = False
        self._changed = threading.Condition()
        self._first = self._connect()
        in_background(self._hear, _THREAD)

    def finish(self, attempt, status, last):
        self._first.send(attempt=attempt, status=status, final=last)
        with self._changed:
            self._changed.wait_for(lambda: attempt in self._verdicts or self._lost)
            return self._verdicts.get(attempt, False)

    def close(self):
        self._first.send(through=True)

    def _connect(self):
        world = self._world
        address = f"{world.address}:{world.port + 1}"
        deadline = time.monotonic() + _MEET
        while True:
            try:
                first = connect(world.address, world.port + 1, _TRY * 10)
                first.send(rank=world.rank, size=world.size, host=socket.gethostname())
                self._lines = first.lines()
                if next(self._lines, None) is not None:
                    return first
                raise InputError(
                    f"at {address} is the supervisor of another run, or another program: "
                    "--max-restarts takes the port after MASTER_PORT; give another MASTER_PORT "
                    "(deepspeed --master_port)",
                    one_rank=True,
                )
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RanksLost(
                        f"rank {world.rank}: the first rank's supervisor does not answer at "
                        f"{address} ({error.strerror or error})"
                    ) from None
                if self._supervised.stopped:
                    raise Stopped(
                        "stopped before all ranks had met, as asked; the same command goes on"
                    ) from None
            time.sleep(_TRY)

    def _hear(self):
        for message in self._lines:
            if message.get("over"):
                self._supervised.end_attempt(int(message["attempt"]))
            else:
                with self._changed:
                    self._verdicts[int(message["attempt"])] = bool(message["again"])
                    self._changed.notify_all()
        with self._changed:
            self._lost = True
            attempt = max(self._verdicts, default=-1) + 1
            self._changed.notify_all()
        self._supervised.end_attempt(attempt)


def _meet(world, supervised):
    if world.size == 1:
        return _Alone()
    return _First(world, supervised) if world.rank == 0 else _Other(world, supervised)


def _die_with(supervisor):
    """This process is killed where its supervisor is: nobody would know of it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != supervisor:  # it was gone before
        os._exit(128 + signal.SIGKILL)
