"""Lines of JSON between processes of a run, over connections whose end the kernel tells: a process
that died, a host that is gone. Needs nothing but Python.

A process that hangs or is stopped keeps its connection: it is not dead.
"""

import contextlib
import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator

from trainer.files.close_on_fork import keep_from_forks

# A host that is gone is known after idle + interval * count seconds, whatever the processes do: the
# kernels ask each other.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}
_UNANSWERED = 35_000  # milliseconds until something sent counts as lost
_LONGEST = 2**16


class Connection:
    """One end of a connection: lines out, lines in. A peer that is gone is the end of `lines`, and
    `send` gives False."""

    def __init__(self, link: socket.socket):
        self._link = link
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message) -> bool:
        """Whether the kernel took it."""
        try:
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def lines(self) -> Iterator[dict]:
        """What the other end says, until it is gone. What is no message ends it too."""
        rest = b""
        while b"\n" in rest or len(rest) < _LONGEST:
            line, newline, behind = rest.partition(b"\n")
            if newline:
                rest = behind
                try:
                    message = json.loads(line)
                except ValueError:
                    return
                if not isinstance(message, dict):
                    return
                yield message
                continue
            try:
                received = self._link.recv(4096)
            except OSError:
                return
            if not received:
                return
            rest += received

    def close(self):
        """Ends it for both, whoever is reading."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()


def listen(port: int, places: int) -> socket.socket:
    """A socket that waits for so many at a port of all interfaces; 0: any free one. Raises
    OSError."""
    try:
        return keep_from_forks(_listen(socket.AF_INET6, port, places))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return keep_from_forks(
        _listen(socket.AF_INET, port, places)
    )  # a machine without IPv6


def _listen(family, port, places):
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", port))
        listener.listen(places)
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> Connection:
    """The next one who comes. Raises OSError where the listener is closed."""
    return Connection(keep_from_forks(listener.accept()[0]))


def serve(
    listener: socket.socket, hear: Callable[[Connection], None], name: str
) -> None:
    """Hears everybody who comes, each in a thread of that name, until the listener is closed."""

    def accept_all():
        while True:
            try:
                connection = accept(listener)
            except OSError:
                return
            in_background(lambda connection=connection: hear(connection), name)

    in_background(accept_all, name)


def in_background(work: Callable[[], None], name: str) -> None:
    """Calls work() in a thread that holds up no process's end."""
    threading.Thread(target=work, daemon=True, name=name).start()


def connect(address: str, port: int, seconds: float) -> Connection:
    """Raises OSError where nobody answers in time."""
    return Connection(
        keep_from_forks(socket.create_connection((address, port), timeout=seconds))
    )
