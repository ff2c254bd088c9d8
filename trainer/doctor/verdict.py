"""A verdict on one thing that was looked at."""

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How much it matters: a fault ends or spoils a run, a warning slows it or may end it later."""

    OK = "ok"
    SKIPPED = "–"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Verdict:
    """One line of the table: what was looked at, what was found, and what to do about it.

    Verdict("shared memory", Level.FAULT, "host1: 0.0 MB of /dev/shm are free", "mount a larger one")
    """

    check: str
    level: Level
    finding: str
    way_out: str = ""

    @property
    def text(self) -> str:
        """Finding and way out, as a line has them."""
        if self.way_out:
            return f"{self.finding}: {self.way_out}"
        return self.finding


def has_fault(verdicts: list[Verdict]) -> bool:
    """Whether any of them is a fault."""
    return any(verdict.level is Level.FAULT for verdict in verdicts)
