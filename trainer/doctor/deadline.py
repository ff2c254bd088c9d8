"""A deadline for what may hang, such as a look at a mount whose server is away."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Unanswered(Exception):
    """It took longer than its deadline; its thread is left behind."""


def call_with_deadline(probe: Callable[[], T], seconds: float) -> T:
    """What probe() returns or raises; Unanswered where it takes longer than so many seconds.

        names = call_with_deadline(lambda: os.listdir("/mnt/shared"), 15.0)

    A call that hangs in the kernel cannot be ended: its thread stays until the process ends.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = probe()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, name="probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Unanswered(f"no answer within {seconds:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
