"""Who is still there: each rank holds a connection to the first one, and says why it leaves.

A process that dies closes its connection, a host that is gone stops answering the kernel, and the
first rank tells all others within a minute, whatever they wait for: on a device the host waits
behind a kernel that nobody ends. A rank that cannot go on sends its reason first, so that the first
rank says it once for all, with rank and host, and all end with its status. A process that hangs or
is stopped is there: that is left to timeout_minutes.
"""

import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.distributed.json_lines import (
    Connection,
    connect,
    in_background,
    listen,
    serve,
)
from trainer.distributed.process_exit import end_process
from trainer.errors import LOST, InputError, NotFinite, RanksLost, Stopped, say

_KEY = "liveness"
_THREAD = "liveness"
_REACH = 5.0  # seconds in which an address answers
_OTHERS_SPEAK = 5.0  # seconds in which ranks that meet the same say so
_NEWS_TRAVELS = 0.2  # seconds in which a cause comes beside its consequences
_NEWS = 3.0  # seconds from the backend's error to the news of who is gone
# Seconds that the main thread has to end by itself, before the process is ended where it waits.
_BY_ITSELF = 5.0
_LONGEST = 2000


@dataclass(frozen=True)
class Departure:
    """How a rank left before its time. refused: it met an InputError; else it failed, lost the
    others, or died without a word (status RanksLost.status, text "")."""

    rank: int
    host: str
    refused: bool
    text: str
    status: int

    def __str__(self):
        who = f"rank {self.rank} on {self.host}"
        if self.refused:
            return f"{who}: {self.text}"
        if self.status == RanksLost.status:
            return f"{who} {self.text or 'is gone'}"
        return f"{who} failed ({self.text}; its trace is in its own lines)"

    @property
    def distance(self) -> int:
        """How far it is from the cause, where several left: a reason is nearest, a rank that only
        lost others is farthest."""
        if self.refused:
            return 0
        if self.status != RanksLost.status:
            return 1
        return 3 if self.text else 2


class Liveness:
    """This rank's view of the others; of one rank alone there is nothing to see."""

    def __init__(self, rank: int):
        self.rank = rank
        self._host = socket.gethostname()
        self._changed = threading.Condition()
        self._departed: dict[int, Departure] = {}
        self._ended = False  # this rank leaves, or has begun to say why

    def leave(self) -> None:
        """This rank is through; what others do from now on is their own."""
        self._ended = True

    def refuse(self, error: InputError) -> None:
        """This rank leaves with an InputError: it is said, here or by the first rank, once for all
        ranks that meet it."""

    def fail(self, error: BaseException) -> None:
        """This rank leaves with a fault, whose trace it prints."""

    def explain(self, lost: RanksLost) -> InputError:
        """The backend lost the others: what is known of them. What is returned is to be raised in
        its place."""
        return lost

    def _describe(self, gone: Departure) -> RanksLost:
        return RanksLost(
            f"rank {self.rank}: lost the others ({gone}): {LOST}", one_rank=True
        )


class FirstRank(Liveness):
    """Holds the connections of all others."""

    def __init__(self, size: int, publish: Callable[[str], None]):
        super().__init__(0)
        self._size = size
        self._members: dict[int, Connection] = {}
        self._through: set[int] = set()
        self._told: set[str] = set()
        self._token = secrets.token_hex(8)
        self._listener = listen(0, size)
        publish(f"{self._listener.getsockname()[1]} {self._token}")
        serve(self._listener, self._hear, _THREAD)

    def leave(self):
        super().leave()
        with self._changed:
            members = list(self._members.values())
        for member in members:
            member.send(kind="through")
        self._listener.close()

    def refuse(self, error):
        self._ended = True
        own = Departure(0, self._host, True, _line(error), error.status)
        with self._changed:
            self._changed.wait_for(self._all_spoke, _OTHERS_SPEAK)
        self._tell(own, error)
        error.said = True

    def fail(self, error):
        self._ended = True
        self._send_all(
            Departure(
                0, self._host, False, f"{type(error).__name__}: {_line(error)}", 1
            ),
            said=False,
        )

    def explain(self, lost):
        with self._changed:
            self._changed.wait_for(lambda: self._departed, _NEWS)
            if not self._departed:
                return lost
            self._changed.wait_for(self._all_spoke, _NEWS_TRAVELS)
            self._ended = True
            first = self._cause()
        if first.refused:
            self._tell()
            return _ended_by(first)
        described = self._describe(first)
        self._send_all(first, said=False)
        return described

    def _cause(self):
        """A reason where somebody gave one; who died comes before who met that."""
        return min(self._departed.values(), key=lambda left: left.distance)

    def _all_spoke(self):
        return len(self._departed.keys() | self._through) == self._size - 1

    def _tell(self, own: Departure | None = None, error: InputError | None = None):
        """Says what is to be said on stderr, each text once with those who met it, and lets the
        others know that it was said.

        own: the first rank's own departure, with its error.
        """
        with self._changed:
            left = [one for one in self._departed.values() if one.refused]
            reasons = ([own] if own else []) + left
            new = [one for one in reasons if one.text not in self._told]
            self._told.update(one.text for one in reasons)
            ranks = len(reasons) + len(self._through)
        same = ranks == self._size and len({one.text for one in reasons}) == 1
        if own in new and (same or isinstance(error, (Stopped, NotFinite))):
            say(error)
        else:
            for text in dict.fromkeys(one.text for one in new):
                _say_of([one for one in new if one.text == text])
        self._send_all(own or left[0], said=True, agreed=same)

    def _send_all(self, cause, said, agreed=False):
        with self._changed:
            members = list(self._members.values())
        message = {
            "rank": cause.rank,
            "host": cause.host,
            "refused": cause.refused,
            "text": cause.text,
        }
        for member in members:
            member.send(
                kind="over", status=cause.status, said=said, agreed=agreed, **message
            )

    def _hear(self, member):
        lines = member.lines()
        hello = next(lines, {})
        if hello.get("token") != self._token:
            member.close()
            return
        rank, host = int(hello["rank"]), str(hello["host"])
        with self._changed:
            self._members[rank] = member
        member.send(kind="welcome", host=self._host)
        for message in lines:
            if message.get("kind") == "through":
                with self._changed:
                    self._through.add(rank)
                    self._changed.notify_all()
                return
            if message.get("kind") == "leaves":
                text, status = str(message["text"]), int(message["status"])
                self._lose(
                    Departure(rank, host, bool(message["refused"]), text, status)
                )
                return
        self._lose(Departure(rank, host, False, "", RanksLost.status))

    def _lose(self, departure):
        with self._changed:
            first = not self._departed
            self._departed[departure.rank] = departure
            self._changed.notify_all()
        if first and not self._ended:
            self._conclude(departure.refused)

    def _conclude(self, refused):
        """Ends this rank where its main thread does not: it waits for what nobody will send."""
        time.sleep(_OTHERS_SPEAK if refused else _NEWS_TRAVELS)
        if self._ended:
            return
        cause = self._cause()
        if cause.refused:
            self._tell()
        else:
            self._send_all(cause, said=False)
        time.sleep(_BY_ITSELF)
        if not self._ended:
            self._ended = True
            if not cause.refused:
                say(self._describe(cause))
            end_process(cause.status if cause.refused else RanksLost.status)


class OtherRank(Liveness):
    """Holds a connection to the first rank."""

    def __init__(self, rank: int, first: Connection, token: str):
        super().__init__(rank)
        self._first = first
        self._news: Departure | None = None
        self._said = False
        self._agreed = False
        self._lines = first.lines()
        first.send(token=token, rank=rank, host=self._host)
        welcome = next(self._lines, None)
        if welcome is None:
            raise OSError("no answer")
        self._first_host = str(welcome["host"])
        in_background(self._hear, _THREAD)

    def leave(self):
        super().leave()
        self._first.send(kind="through")

    def refuse(self, error):
        self._ended = True
        if not self._send(True, _line(error), error.status):
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._news is not None, _OTHERS_SPEAK + _BY_ITSELF
            )
            said = self._said
            agreed = self._agreed
        error.said = said and (agreed or self._first_host == self._host)

    def fail(self, error):
        self._ended = True
        self._send(False, f"{type(error).__name__}: {_line(error)}", 1)

    def explain(self, lost):
        with self._changed:
            self._changed.wait_for(lambda: self._news is not None, _NEWS)
            self._ended = True
            news = self._news
            said = self._said
        if news is None:
            self._send(False, "has lost the others", RanksLost.status)
            return lost
        if not news.refused:
            return self._describe(news)
        ended = _ended_by(news)
        ended.said = said
        return ended

    def _send(self, refused, text, status):
        return self._first.send(
            kind="leaves", refused=refused, text=text, status=status
        )

    def _hear(self):
        for message in self._lines:
            if message.get("kind") == "through":
                return
            if message.get("kind") == "over":
                departure = Departure(
                    int(message["rank"]),
                    str(message["host"]),
                    bool(message["refused"]),
                    str(message["text"]),
                    message["status"],
                )
                self._learn(departure, bool(message["said"]), bool(message["agreed"]))
                return
        self._learn(
            Departure(0, self._first_host, False, "", RanksLost.status), False, False
        )

    def _learn(self, news, said, agreed):
        with self._changed:
            self._news = news
            self._said = said
            self._agreed = agreed
            self._changed.notify_all()
        time.sleep(_BY_ITSELF)
        if not self._ended:
            self._ended = True
            if not said:
                say(self._describe(news))
            end_process(news.status if news.refused else RanksLost.status)


def watch(store, rank: int, size: int, addresses: list[str]) -> Liveness:
    """Connects this rank with the first one. Called on all ranks.

    store: of the process group, through which the first rank says where it listens. addresses:
    where it may be reached. Where it cannot be, that is said and the run goes on: a rank that dies
    is then noticed as the backend notices it.
    """
    if size == 1:
        return Liveness(rank)
    if rank == 0:
        return FirstRank(
            size, lambda where: store.set(_KEY, f"{where} {socket.gethostname()}")
        )
    port, token, host = store.get(_KEY).decode().split(" ")
    for address in dict.fromkeys([*addresses, host]):
        try:
            return OtherRank(rank, connect(address, int(port), _REACH), token)
        except OSError:
            continue
    print(
        f"rank {rank} on {socket.gethostname()}: no connection to port {port} of "
        f"{' or '.join([*addresses, host])}: a rank or a host that is gone is noticed late, after "
        "timeout_minutes; open the hosts' ports to each other",
        file=sys.stderr,
        flush=True,
    )
    return Liveness(rank)


def _ended_by(departure):
    """The InputError of another rank, which has been said."""
    error = InputError(str(departure))
    error.status = departure.status
    error.said = True
    return error


def _say_of(departures):
    """One text and all who met it."""
    if len(departures) == 1:
        who = f"rank {departures[0].rank} on {departures[0].host}"
    else:
        who = f"{len(departures)} ranks, rank {departures[0].rank} on {departures[0].host} among them"
    error = InputError(f"{who}: {departures[0].text}")
    error.status = departures[0].status
    say(error)


def _line(error):
    return " ".join(str(error).split())[:_LONGEST]
