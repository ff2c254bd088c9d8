"""A failure detector: each rank holds a connection to the first one, and says why it leaves.

A process that dies closes its connection, and a host that is gone stops answering the kernel. The
first rank tells all others within a minute, whatever they wait for: on a device the host waits
behind a kernel that nobody ends. A rank that cannot go on sends its reason first. The first rank
then says it once for all, with rank and host, and all end with its status. A process that hangs or
is stopped is alive: that is left to timeout_minutes.

Messages, a line of JSON each:

    to the first rank     {token, rank, host}      first
                          {kind: leaves, refused, text, status}   or   {kind: through}
    from the first rank   {kind: welcome, host}    first
                          {kind: over, rank, host, refused, text, status, said, agreed}
                          or   {kind: through}
"""

import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.distributed.json_lines import (
    Connection,
    connect,
    listen,
    run_in_background,
    serve,
)
from trainer.distributed.process_exit import end_process
from trainer.errors import (
    RANKS_LOST_ADVICE,
    InputError,
    LostRanks,
    NonFiniteLoss,
    RunStopped,
    print_error,
)
from trainer.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed import Store

_KEY = "liveness"
_THREAD = "liveness"
_REACH = 5.0  # seconds in which an address answers
_OTHERS_SPEAK = 5.0  # seconds in which ranks that meet the same say so
_NEWS_TRAVELS = 0.2  # seconds in which a cause comes beside its consequences
_NEWS = 3.0  # seconds from the backend's error to the news of who is gone
# Seconds that the main thread has to end by itself, before the process is ended where it waits.
_BY_ITSELF = 5.0
_LONGEST = 2000  # letters of a reason

_Message = dict[str, Any]


@dataclass(frozen=True)
class Departure:
    """How a rank left before its time; as a message names it:

        rank 3 on host1: data/shop: is not there         refused
        rank 3 on host1 is gone
        rank 3 on host1 has lost the others
        rank 3 on host1 failed (ValueError: …; its trace is in its own lines)

    refused: it met an InputError. Else it failed, lost the others, or died without a word (status
    LostRanks.status, text "").
    """

    rank: int
    host: str
    refused: bool
    text: str
    status: int

    def __str__(self) -> str:
        who = f"rank {self.rank} on {self.host}"
        if self.refused:
            return f"{who}: {self.text}"
        if self.status == LostRanks.status:
            return f"{who} {self.text or 'is gone'}"
        return f"{who} failed ({self.text}; its trace is in its own lines)"

    @property
    def distance(self) -> int:
        """How far it is from the cause, where several ranks left.

        A reason is nearest, a rank that only lost others is farthest.
        """
        if self.refused:
            return 0
        if self.status != LostRanks.status:
            return 1
        if not self.text:
            return 2
        return 3

    @property
    def exit_status(self) -> int:
        """The status with which the other ranks end."""
        if self.refused:
            return self.status
        return LostRanks.status


def _read_departure(
    rank: int,
    host: str,
    message: _Message,
) -> Departure:
    """A departure from the message that tells it."""
    return Departure(
        rank,
        host,
        refused=bool(message["refused"]),
        text=str(message["text"]),
        status=int(message["status"]),
    )


def _died(rank: int, host: str) -> Departure:
    """The departure of a rank whose connection has ended without a word."""
    return Departure(
        rank, host, refused=False, text="", status=LostRanks.status
    )


def _refusal(
    rank: int,
    host: str,
    error: InputError,
) -> Departure:
    """The departure of a rank that met an InputError."""
    text = _in_one_line(error)
    return Departure(rank, host, refused=True, text=text, status=error.status)


def _fault(
    rank: int,
    host: str,
    error: BaseException,
) -> Departure:
    """The departure of a rank that met any other exception."""
    if isinstance(error, KeyboardInterrupt):
        return Departure(
            rank, host, refused=True, text="interrupted", status=INTERRUPTED
        )
    kind = type(error).__name__
    text = f"{kind}: {_in_one_line(error)}"
    return Departure(rank, host, refused=False, text=text, status=1)


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

    def report_error(self, error: InputError) -> None:
        """Reports that this rank leaves with an InputError.

        It is said, here or by the first rank, once for all ranks that meet it.
        """

    def report_fault(self, error: BaseException) -> None:
        """Reports that this rank leaves with a fault, whose trace it prints."""

    def explain_loss(self, lost: LostRanks) -> InputError:
        """The error to be raised in place of `lost`, which a backend raised: it names the cause."""
        return lost

    def _describe(self, departure: Departure) -> LostRanks:
        """This rank's error where another has left."""
        return LostRanks(
            f"rank {self.rank}: lost the others ({departure}): {RANKS_LOST_ADVICE}",
            one_rank=True,
        )

    def _end(self, departure: Departure, said: bool) -> None:
        """Ends this process, if its main thread does not: it waits for what nobody will send."""
        time.sleep(_BY_ITSELF)
        if self._ended:
            return
        self._ended = True
        if not said:
            print_error(self._describe(departure))
        end_process(departure.exit_status)


class FirstRank(Liveness):
    """The first rank's view: it holds the connections of all others."""

    def __init__(self, size: int, publish: Callable[[str], None]):
        super().__init__(0)
        self._size = size
        self._members: dict[int, Connection] = {}
        self._through: set[int] = set()
        self._said: set[str] = set()
        self._token = secrets.token_hex(8)
        self._listener = listen(0, size)
        port = self._listener.getsockname()[1]
        publish(f"{port} {self._token}")
        serve(self._listener, self._hear, _THREAD)

    def leave(self) -> None:
        super().leave()
        for member in self._list_members():
            member.send(kind="through")
        self._listener.close()

    def report_error(self, error: InputError) -> None:
        self._ended = True
        departure = _refusal(0, self._host, error)
        with self._changed:
            self._changed.wait_for(self._all_spoke, _OTHERS_SPEAK)
        self._say_reasons(departure, error)
        error.said = True

    def report_fault(self, error: BaseException) -> None:
        self._ended = True
        departure = _fault(0, self._host, error)
        self._send_all(departure, said=False)

    def explain_loss(self, lost: LostRanks) -> InputError:
        with self._changed:
            self._changed.wait_for(lambda: self._departed, _NEWS)
            if not self._departed:
                return lost
            self._changed.wait_for(self._all_spoke, _NEWS_TRAVELS)
            self._ended = True
            cause = self._find_cause()
        if cause.refused:
            self._say_reasons()
            return _ended_by(cause)
        self._send_all(cause, said=False)
        return self._describe(cause)

    def _list_members(self) -> list[Connection]:
        """The connections of the ranks that have met the first one so far."""
        with self._changed:
            return list(self._members.values())

    def _find_cause(self) -> Departure:
        """A reason where somebody gave one; who died comes before who met that."""
        return min(
            self._departed.values(), key=lambda departure: departure.distance
        )

    def _all_spoke(self) -> bool:
        """Whether every other rank has said that it leaves or is through."""
        spoke = self._departed.keys() | self._through
        return len(spoke) == self._size - 1

    def _say_reasons(
        self,
        refusal: Departure | None = None,
        error: InputError | None = None,
    ) -> None:
        """Says the reasons on stderr, each text once with the ranks that met it.

        The other ranks then learn that it was said. refusal: the first rank's own departure, with
        its error.
        """
        reasons = []
        new_reasons = []
        texts = set()
        with self._changed:
            if refusal is not None:
                reasons.append(refusal)
            for departure in self._departed.values():
                if departure.refused:
                    reasons.append(departure)
            for reason in reasons:
                texts.add(reason.text)
                if reason.text not in self._said:
                    new_reasons.append(reason)
            self._said |= texts
            ranks = len(reasons) + len(self._through)
        agreed = ranks == self._size and len(texts) == 1
        concerns_all = agreed or isinstance(error, RunStopped | NonFiniteLoss)
        if error is not None and concerns_all and refusal in new_reasons:
            print_error(error)
        else:
            for departures in _group_by_text(new_reasons):
                _say_for_all(departures)
        self._send_all(reasons[0], said=True, agreed=agreed)

    def _send_all(
        self,
        cause: Departure,
        said: bool,
        agreed: bool = False,
    ) -> None:
        """Tells the other ranks why the run is over, so that each ends.

        said: it is on stderr. agreed: all ranks met it.
        """
        for member in self._list_members():
            member.send(
                kind="over",
                rank=cause.rank,
                host=cause.host,
                refused=cause.refused,
                text=cause.text,
                status=cause.status,
                said=said,
                agreed=agreed,
            )

    def _hear(self, member: Connection) -> None:
        """Reads what one of the other ranks sends, until its connection ends."""
        messages = member.lines()
        hello = next(messages, {})
        if hello.get("token") != self._token:
            member.close()
            return
        rank = int(hello["rank"])
        host = str(hello["host"])
        with self._changed:
            self._members[rank] = member
        member.send(kind="welcome", host=self._host)
        departure = _died(rank, host)
        for message in messages:
            kind = message.get("kind")
            if kind == "through":
                self._note_through(rank)
                return
            if kind == "leaves":
                departure = _read_departure(rank, host, message)
                break
        self._note_departure(departure)

    def _note_through(self, rank: int) -> None:
        """Notes that a rank needs the others no more."""
        with self._changed:
            self._through.add(rank)
            self._changed.notify_all()

    def _note_departure(self, departure: Departure) -> None:
        """Notes it; the first departure ends the run, unless this rank ends already."""
        with self._changed:
            is_first = not self._departed
            self._departed[departure.rank] = departure
            self._changed.notify_all()
        if is_first and not self._ended:
            self._conclude(departure.refused)

    def _conclude(self, refused: bool) -> None:
        """Tells all ranks why the run is over, and ends this one."""
        pause = _NEWS_TRAVELS
        if refused:
            pause = _OTHERS_SPEAK
        time.sleep(pause)
        if self._ended:
            return
        cause = self._find_cause()
        if cause.refused:
            self._say_reasons()
        else:
            self._send_all(cause, said=False)
        self._end(cause, said=cause.refused)


class OtherRank(Liveness):
    """Another rank's view: it holds a connection to the first rank."""

    def __init__(
        self,
        rank: int,
        first: Connection,
        token: str,
    ):
        super().__init__(rank)
        self._first = first
        self._news: Departure | None = None
        self._said = False
        self._agreed = False
        self._messages = first.lines()
        first.send(token=token, rank=rank, host=self._host)
        welcome = next(self._messages, None)
        if welcome is None:
            raise OSError("no answer")
        self._first_host = str(welcome["host"])
        run_in_background(self._hear, _THREAD)

    def leave(self) -> None:
        super().leave()
        self._first.send(kind="through")

    def report_error(self, error: InputError) -> None:
        self._ended = True
        departure = _refusal(self.rank, self._host, error)
        if not self._send(departure):
            return
        with self._changed:
            self._changed.wait_for(self._has_news, _OTHERS_SPEAK + _BY_ITSELF)
            said = self._said
            agreed = self._agreed
        error.said = said and (agreed or self._first_host == self._host)

    def report_fault(self, error: BaseException) -> None:
        self._ended = True
        departure = _fault(self.rank, self._host, error)
        self._send(departure)

    def explain_loss(self, lost: LostRanks) -> InputError:
        with self._changed:
            self._changed.wait_for(self._has_news, _NEWS)
            self._ended = True
            news = self._news
            said = self._said
        if news is None:
            departure = Departure(
                self.rank,
                self._host,
                refused=False,
                text="has lost the others",
                status=LostRanks.status,
            )
            self._send(departure)
            return lost
        if not news.refused:
            return self._describe(news)
        error = _ended_by(news)
        error.said = said
        return error

    def _has_news(self) -> bool:
        """Whether the first rank has said why the run is over."""
        return self._news is not None

    def _send(self, departure: Departure) -> bool:
        """Tells the first rank why this one leaves. Whether it was sent."""
        return self._first.send(
            kind="leaves",
            refused=departure.refused,
            text=departure.text,
            status=departure.status,
        )

    def _hear(self) -> None:
        """Reads what the first rank sends, until its connection ends."""
        for message in self._messages:
            kind = message.get("kind")
            if kind == "through":
                return
            if kind == "over":
                rank = int(message["rank"])
                host = str(message["host"])
                news = _read_departure(rank, host, message)
                said = bool(message["said"])
                agreed = bool(message["agreed"])
                self._learn(news, said, agreed)
                return
        news = _died(0, self._first_host)
        self._learn(news, said=False, agreed=False)

    def _learn(
        self,
        news: Departure,
        said: bool,
        agreed: bool,
    ) -> None:
        """Notes why the run is over, and ends this process where it does not end by itself."""
        with self._changed:
            self._news = news
            self._said = said
            self._agreed = agreed
            self._changed.notify_all()
        self._end(news, said)


def watch_peers(
    store: "Store",
    rank: int,
    size: int,
    addresses: list[str],
) -> Liveness:
    """Connects this rank with the first one. Collective.

    The first rank serves; all others connect, and each then hears of the others through it.

    store: of the process group, through which the first rank says where it listens. addresses:
    where it may be reached. Where it cannot be, that is said and the run goes on: a rank that dies
    is then noticed as the backend notices it.
    """
    if size == 1:
        return Liveness(rank)
    host = socket.gethostname()
    if rank == 0:

        def publish(port_and_token: str) -> None:
            store.set(_KEY, f"{port_and_token} {host}")

        return FirstRank(size, publish)
    published = store.get(_KEY).decode()
    port, token, first_host = published.split(" ")
    tried = [*addresses, first_host]
    for address in dict.fromkeys(tried):
        try:
            first = connect(address, int(port), _REACH)
            return OtherRank(rank, first, token)
        except OSError:
            continue
    choices = " or ".join(tried)
    print(
        f"rank {rank} on {host}: no connection to port {port} of {choices}: a rank or a "
        "host that is gone is noticed late, after timeout_minutes; open the hosts' "
        "ports to each other",
        file=sys.stderr,
        flush=True,
    )
    return Liveness(rank)


def _ended_by(departure: Departure) -> InputError:
    """The InputError of another rank, which has been said."""
    error = InputError(str(departure))
    error.status = departure.status
    error.said = True
    return error


def _group_by_text(departures: list[Departure]) -> list[list[Departure]]:
    """Departures of one text together, in the order in which texts come first.

    Of texts a, b, a: the two of a, then the one of b.
    """
    groups: dict[str, list[Departure]] = {}
    for departure in departures:
        groups.setdefault(departure.text, []).append(departure)
    return list(groups.values())


def _say_for_all(departures: list[Departure]) -> None:
    """Says one text with the ranks that met it."""
    first = departures[0]
    who = f"rank {first.rank} on {first.host}"
    ranks = len(departures)
    if ranks > 1:
        who = f"{ranks} ranks, {who} among them"
    error = InputError(f"{who}: {first.text}")
    error.status = first.status
    print_error(error)


def _in_one_line(error: BaseException) -> str:
    """An error's message without line breaks, of at most _LONGEST letters."""
    line = " ".join(str(error).split())
    return line[:_LONGEST]
