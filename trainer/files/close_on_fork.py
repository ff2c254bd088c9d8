"""What a forked process must not keep open for its parent: a lock's file, a connection whose end
says that its owner is gone.

A loader of batches lives on for some seconds where its trainer is killed.
"""

import os
import threading
import weakref

_guard = (
    threading.RLock()
)  # no fork between the opening of a thing and its place in `_kept`
_kept = weakref.WeakSet()


def open_unshared(opener, *arguments):
    """opener(*arguments), a file or a socket, which forked processes close at once. It must not
    wait: no fork does meanwhile."""
    with _guard:
        return keep_from_forks(opener(*arguments))


def keep_from_forks(thing):
    """Forked processes close it at once."""
    with _guard:
        _kept.add(thing)
    return thing


def _close_in_child():
    global _guard
    _guard = threading.RLock()
    for thing in list(_kept):
        thing.close()


os.register_at_fork(
    before=lambda: _guard.acquire(),
    after_in_parent=lambda: _guard.release(),
    after_in_child=_close_in_child,
)
