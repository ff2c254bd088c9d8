"""Closes in a forked process what only its parent may hold open.

That is a lock's file, or a connection whose end says that its owner is gone: a worker that loads
batches lives on for some seconds where its trainer is killed.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Closable(Protocol):
    """A file, a socket, a connection."""

    def close(self) -> object: ...


T = TypeVar("T", bound=Closable)

# No fork between the opening of a thing and its registration in `_registered`.
_guard = threading.RLock()
_registered: weakref.WeakSet[Any] = weakref.WeakSet()


def open_unshared(opener: Callable[..., T], *arguments: Any) -> T:
    """Opens a file or a socket by `opener(*arguments)`, which forked processes close at once.

    The opener must not wait: no fork happens meanwhile.
    """
    with _guard:
        return keep_from_forks(opener(*arguments))


def keep_from_forks(resource: T) -> T:
    """Registers a file or a socket, which forked processes close at once; returns it."""
    with _guard:
        _registered.add(resource)
    return resource


def _close_in_child() -> None:
    global _guard
    _guard = threading.RLock()
    for resource in list(_registered):
        resource.close()


os.register_at_fork(
    before=lambda: _guard.acquire(),
    after_in_parent=lambda: _guard.release(),
    after_in_child=_close_in_child,
)
