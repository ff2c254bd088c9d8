"""Restarts a command where it fails, on all ranks together.

Each rank's process supervises a child that does the work. A launcher sees nothing when a child
dies, so the supervisors tell each other: they are connected with the first rank's, at the port
after the rendezvous's. Where one child ends before its time the others are ended too, whatever they
wait for. When all are gone, all begin the next attempt, or none does.

Messages, a line of JSON each:

    to the first rank     {rank, size, host}                    first
                          {attempt, status, final}              a child's end; final: no restart
                          {through}                             no attempt follows
    from the first rank   {welcome}                             first
                          {attempt, over}                       a child has failed: end yours
                          {attempt, again}                      all have ended; whether to restart
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType

from trainer.child_processes import die_with_parent
from trainer.distributed.json_lines import (
    Connection,
    connect,
    listen,
    run_in_background,
    serve,
)
from trainer.distributed.launchers import World, enter_world, read_world
from trainer.errors import InputError, LostRanks, NonFiniteLoss, RunStopped
from trainer.interrupts import leave_terminal, stop_signals
from trainer.process_name import process_name

_THREAD = "supervisor"
_UNDER_SUPERVISION = "SYNCREC_UNDER_SUPERVISION"
_SUPERVISOR = "SYNCREC_SUPERVISOR"  # its process number
# A restart would end the same.
_NOT_AGAIN = {InputError.status, NonFiniteLoss.status, RunStopped.status}
_BY_ITSELF = 20.0  # seconds in which a child ends after another one has
_MEET = 600.0  # seconds in which all supervisors are started
_REACH = 5.0  # seconds in which the first rank's supervisor answers
_TRY = 0.5  # seconds between two looks
_OTHER_PORT = (
    "--max-restarts takes the port after MASTER_PORT; give another MASTER_PORT "
    "(deepspeed --master_port)"
)


def supervise(max_restarts: int, pause: float = 2.0) -> None:
    """Runs this very command as a child, and again where it fails, up to `max_restarts` times.

        def main():
            supervise(max_restarts=3)
            train()    # in the child

    Ends this process with the last child's status, 128 + n where signal n ended it. In the child it
    returns. Under a launcher each rank's process does so for itself, and all know of each other.
    pause: seconds before the next attempt.
    """
    if os.environ.get(_UNDER_SUPERVISION):
        if _SUPERVISOR in os.environ:
            die_with_parent(int(os.environ[_SUPERVISOR]))
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "--max-restarts: torchrun restarts by itself, give it to torchrun (before the "
            "script's name)"
        )
    child = _Child()
    for number in stop_signals():
        signal.signal(number, child.pass_on)
    world = read_world()
    enter_world(world)
    peers = _meet_peers(world, child)
    status = _run_attempts(child, peers, world.rank, max_restarts, pause)
    peers.close()
    if status < 0:
        status = 128 - status
    sys.exit(status)


def _run_attempts(
    child: "_Child",
    peers: "_Peers",
    rank: int,
    max_restarts: int,
    pause: float,
) -> int:
    """Runs the child until all ranks end; the status of the last attempt, negative for a signal."""
    # As it was typed: `python -m`, `syncrec train` and a script's path alike.
    arguments = sys.orig_argv[1:]
    for attempt in range(max_restarts + 1):
        status = child.run(attempt, arguments)
        last = child.stopped or attempt == max_restarts
        if not peers.finish(attempt, status, last):
            break
        end = f"status {status}"
        if status < 0:
            end = f"signal {-status}"
        restart = f"restart {attempt + 1} of {max_restarts} in {pause:.0f} s"
        _say(f"rank {rank}: ended with {end}; {restart}")
        time.sleep(pause)
        if child.stopped:
            # The others begin, and are not left waiting for this one.
            peers.finish(attempt + 1, status, last=True)
            break
        # What its own attempts have written is resumed.
        arguments = [
            argument for argument in arguments if argument != "--fresh"
        ]
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Child:
    """The child of this process, of which there is one after another.

    stopped: a signal has asked to stop; no other child follows.
    """

    def __init__(self):
        self.stopped = False
        self._process: subprocess.Popen | None = None
        self._attempt = -1
        self._over = -1  # the last attempt that has ended somewhere
        # A signal's handler may come while it is held.
        self._lock = threading.RLock()

    def run(self, attempt: int, arguments: list[str]) -> int:
        """Starts the child of this attempt and waits for its end.

        Returns its status, negative for a signal.
        """
        with self._lock:
            self._attempt = attempt
            command = [sys.executable, *arguments]
            environment = dict(os.environ)
            environment[_UNDER_SUPERVISION] = "1"
            environment[_SUPERVISOR] = str(os.getpid())
            # In a group of its own: what a terminal sends to all (Ctrl-C) comes once, from here.
            process = subprocess.Popen(
                command, env=environment, process_group=0
            )
            self._process = process
            if self.stopped:  # asked between two lines
                process.terminate()
            if self._over >= attempt:
                run_in_background(lambda: self._end(process), _THREAD)
        return process.wait()

    def end_attempt(self, attempt: int) -> None:
        """Another child of this attempt has ended: this one ends by itself, or is killed."""
        with self._lock:
            self._over = max(self._over, attempt)
            process = None
            if self._attempt == attempt:
                process = self._process
        if process is not None:
            run_in_background(lambda: self._end(process), _THREAD)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: passes it on to the child."""
        self.stopped = True
        if number == signal.SIGHUP:
            leave_terminal()
        if self._process is not None:
            self._process.send_signal(number)

    def _end(self, process: subprocess.Popen) -> None:
        """Kills the child where it does not end by itself in time."""
        deadline = time.monotonic() + _BY_ITSELF
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_TRY)
        if process.poll() is None:
            _say(
                f"{process_name()}: another rank has ended, and this one does not: it "
                "is killed"
            )
            process.kill()


class _Peers:
    """The supervisors of the other ranks; in a world of one there are none.

    Each rank calls `finish` after each attempt, and `close` after the last.
    """

    def finish(
        self,
        attempt: int,
        status: int,
        last: bool,
    ) -> bool:
        """Reports that this rank's child has ended, and waits until all have.

        Returns whether all begin again. last: no other attempt may follow.
        """
        return not (last or status == 0 or status in _NOT_AGAIN)

    def close(self) -> None:
        """No attempt follows."""


@dataclass(frozen=True)
class _End:
    """How a rank's child ended.

    status: negative for a signal. last: no other attempt may follow.
    """

    status: int
    last: bool


class _Coordinator(_Peers):
    """The first rank's supervisor towards the others: it hears from all and decides."""

    def __init__(self, world: World, child: _Child):
        self._size = world.size
        self._child = child
        self._members: dict[int, Connection] = {}
        self._ends: dict[int, dict[int, _End]] = {}  # by attempt and rank
        self._gone: str | None = None
        self._changed = threading.Condition()
        port = world.port + 1
        try:
            self._listener = listen(port, world.size)
        except OSError as error:
            host = socket.gethostname()
            raise InputError(
                f"port {port} on {host} is in use ({error.strerror}): {_OTHER_PORT}"
            ) from None
        serve(self._listener, self._hear, _THREAD)

    def finish(
        self,
        attempt: int,
        status: int,
        last: bool,
    ) -> bool:
        self._note_end(0, attempt, _End(status, last))
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(attempt))
            again = not self._gone and _may_restart(self._ends[attempt])
            members = list(self._members.values())
        if self._gone:
            _say(f"error: {self._gone}: begin again by hand")
        for member in members:
            member.send(attempt=attempt, again=again)
        return again

    def close(self) -> None:
        self._listener.close()

    def _is_over(self, attempt: int) -> bool:
        """Whether all children have ended, or a supervisor is gone that would say so."""
        ends = self._ends[attempt]
        return len(ends) == self._size or self._gone is not None

    def _note_end(
        self,
        rank: int,
        attempt: int,
        end: _End,
    ) -> None:
        with self._changed:
            ends = self._ends.setdefault(attempt, {})
            ends[rank] = end
            members = list(self._members.values())
            self._changed.notify_all()
        if end.status != 0:
            self._end_all(attempt, members)

    def _end_all(self, attempt: int, members: list[Connection]) -> None:
        """Ends the children of an attempt: of these supervisors, and of this one.

        A supervisor whose child has ended already does nothing.
        """
        for member in members:
            member.send(attempt=attempt, over=True)
        self._child.end_attempt(attempt)

    def _hear(self, member: Connection) -> None:
        """Reads what another rank's supervisor sends, until its connection ends."""
        messages = member.lines()
        hello = next(messages, {})
        is_of_another_size = hello.get("size") != self._size
        is_taken = hello.get("rank") in self._members
        if is_of_another_size or is_taken:
            member.close()  # of another run
            return
        rank = int(hello["rank"])
        host = str(hello["host"])
        with self._changed:
            self._members[rank] = member
            failed_attempts = self._list_failed_attempts()
        member.send(welcome=True)
        for attempt in failed_attempts:
            member.send(attempt=attempt, over=True)
        for message in messages:
            if message.get("through"):
                return
            attempt = int(message["attempt"])
            status = int(message["status"])
            last = bool(message["final"])
            self._note_end(rank, attempt, _End(status, last))
        self._lose(rank, host, member)

    def _list_failed_attempts(self) -> list[int]:
        """The attempts in which a child has failed."""
        failed = []
        for attempt, ends in self._ends.items():
            if any(end.status for end in ends.values()):
                failed.append(attempt)
        return failed

    def _lose(
        self,
        rank: int,
        host: str,
        lost: Connection,
    ) -> None:
        """Ends all children, since a supervisor is gone: this attempt's and the next one's."""
        others = []
        with self._changed:
            self._gone = f"the supervisor of rank {rank} on {host} is gone"
            for member in self._members.values():
                if member is not lost:
                    others.append(member)
            attempt = max(self._ends, default=0)
            self._changed.notify_all()
        self._end_all(attempt, others)
        self._end_all(attempt + 1, others)


def _may_restart(ends: dict[int, _End]) -> bool:
    """Whether all ranks begin again after an attempt: one failed, and may not the next time.

    Statuses 0 and 4, or 0 and -9, may; 0 and 0 are done, and 0 and 2 would meet the same again.
    """
    all_succeeded = True
    for end in ends.values():
        if end.last or end.status in _NOT_AGAIN:
            return False
        if end.status != 0:
            all_succeeded = False
    return not all_succeeded


class _Follower(_Peers):
    """Another rank's supervisor: it reports how its child ended and does what the first decides."""

    def __init__(self, world: World, child: _Child):
        self._world = world
        self._child = child
        self._verdicts: dict[
            int, bool
        ] = {}  # by attempt: whether all begin again
        self._lost = False
        self._changed = threading.Condition()
        self._first = self._connect()
        run_in_background(self._hear, _THREAD)

    def finish(
        self,
        attempt: int,
        status: int,
        last: bool,
    ) -> bool:
        self._first.send(attempt=attempt, status=status, final=last)
        with self._changed:
            self._changed.wait_for(lambda: self._is_decided(attempt))
            return self._verdicts.get(attempt, False)

    def close(self) -> None:
        self._first.send(through=True)

    def _is_decided(self, attempt: int) -> bool:
        """Whether the first rank's supervisor has decided what follows an attempt, or is gone."""
        return self._lost or attempt in self._verdicts

    def _connect(self) -> Connection:
        """Connects with the first rank's supervisor. Raises InputError."""
        world = self._world
        port = world.port + 1
        address = f"{world.address}:{port}"
        host = socket.gethostname()
        deadline = time.monotonic() + _MEET
        while True:
            try:
                first = connect(world.address, port, _REACH)
                first.send(
                    rank=world.rank,
                    size=world.size,
                    host=host,
                )
                self._messages = first.lines()
                if next(self._messages, None) is not None:
                    return first
                raise InputError(
                    f"at {address} is the supervisor of another run, or another "
                    f"program: {_OTHER_PORT}",
                    one_rank=True,
                )
            except OSError as error:
                if time.monotonic() > deadline:
                    reason = error.strerror or error
                    raise LostRanks(
                        f"rank {world.rank}: the first rank's supervisor does not "
                        f"answer at {address} ({reason})"
                    ) from None
                if self._child.stopped:
                    raise RunStopped(
                        "stopped before all ranks had met, as asked; the same command goes on"
                    ) from None
            time.sleep(_TRY)

    def _hear(self) -> None:
        """Reads what the first rank's supervisor sends, until its connection ends."""
        for message in self._messages:
            attempt = int(message["attempt"])
            if message.get("over"):
                self._child.end_attempt(attempt)
                continue
            with self._changed:
                self._verdicts[attempt] = bool(message["again"])
                self._changed.notify_all()
        with self._changed:
            self._lost = True
            attempt = max(self._verdicts, default=-1) + 1
            self._changed.notify_all()
        self._child.end_attempt(attempt)


def _meet_peers(world: World, child: _Child) -> _Peers:
    """Connects with the supervisors of the other ranks."""
    if world.size == 1:
        return _Peers()
    if world.rank == 0:
        return _Coordinator(world, child)
    return _Follower(world, child)
