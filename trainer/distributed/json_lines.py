"""Lines of JSON between processes of a run, over TCP connections with keepalive.

The kernel ends a connection whose process died or whose host is gone. A process that hangs or is
stopped keeps its connection: it is not dead. Needs nothing but Python.
"""

import contextlib
import errno
import functools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from trainer.files.close_on_fork import keep_from_forks

# A host that is gone is known after idle + interval * count seconds, whatever the processes do: the
# kernels ask each other.
_TCP_OPTIONS = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 5,
    "TCP_USER_TIMEOUT": 35_000,  # milliseconds until something sent counts as lost
    "TCP_NODELAY": 1,
}
_LONGEST = 2**16  # bytes of a line


class Connection:
    """One end of a connection: lines out, lines in.

    Where the peer is gone `lines` ends, and `send` gives False.
    """

    def __init__(self, link: socket.socket):
        self._link = link
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            option = getattr(socket, name, None)  # a system may not have it
            if option is not None:
                link.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> bool:
        """Sends a JSON object. Whether the kernel took it."""
        line = json.dumps(message).encode() + b"\n"
        try:
            self._link.sendall(line)
        except OSError:
            return False
        return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """The messages of the other end, until it is gone or sends what is no message."""
        buffer = b""
        while b"\n" in buffer or len(buffer) < _LONGEST:
            line, newline, rest = buffer.partition(b"\n")
            if not newline:
                received = self._receive()
                if not received:
                    return
                buffer += received
                continue
            buffer = rest
            try:
                message = json.loads(line)
            except ValueError:
                return
            if not isinstance(message, dict):
                return
            yield message

    def _receive(self) -> bytes:
        """What came next; nothing where the other end is gone."""
        try:
            return self._link.recv(4096)
        except OSError:
            return b""

    def close(self) -> None:
        """Ends the connection for both ends, and for whoever reads it."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()


def listen(port: int, backlog: int) -> socket.socket:
    """A socket that listens at a port of all interfaces; at port 0, at any free one.

    backlog: how many may wait to be accepted. Raises OSError.
    """
    try:
        return keep_from_forks(_listen(socket.AF_INET6, port, backlog))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    # A machine without IPv6.
    return keep_from_forks(_listen(socket.AF_INET, port, backlog))


def _listen(
    family: socket.AddressFamily,
    port: int,
    backlog: int,
) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> Connection:
    """The next connection. Raises OSError where the listener is closed."""
    link, _ = listener.accept()
    return Connection(keep_from_forks(link))


def serve(
    listener: socket.socket,
    handle: Callable[[Connection], None],
    name: str,
) -> None:
    """Accepts connections until the listener is closed, each handled in a thread of that name."""

    def accept_all() -> None:
        while True:
            try:
                connection = accept(listener)
            except OSError:
                return
            run_in_background(functools.partial(handle, connection), name)

    run_in_background(accept_all, name)


def run_in_background(work: Callable[[], object], name: str) -> None:
    """Calls work() in a daemon thread, which does not keep the process from ending."""
    threading.Thread(target=work, daemon=True, name=name).start()


def connect(
    address: str,
    port: int,
    seconds: float,
) -> Connection:
    """Connects with a listener. Raises OSError where nobody answers in time."""
    link = socket.create_connection((address, port), timeout=seconds)
    return Connection(keep_from_forks(link))
