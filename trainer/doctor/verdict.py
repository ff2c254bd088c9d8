"""A verdict on one thing that was looked at, and how a check comes to its verdicts."""

import enum
from dataclasses import dataclass

_NAMED = 4  # verdicts of one check that have a line of their own


class Level(enum.Enum):
    """How much it matters.

    A fault ends or spoils a run. A warning slows it, or may end it later. What was not asked for,
    or does not exist, such as links of one host, is skipped.
    """

    OK = "ok"
    SKIPPED = "–"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Verdict:
    """One line of the table.

        Verdict("clocks", Level.FAULT, "host1: its clock is 60 min ahead of host0's", "set it")

    Attributes:
        check: what was looked at.
        level: how much it matters.
        finding: what was found; it begins with the rank, the host or the pair of hosts.
        way_out: what to do about it.
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


class Check:
    """Collects the verdicts of one check.

    check = Check("clocks")
    check.warn("host1", "its clock is 2.0 s ahead", "set it")
    check.conclude("all within 1 ms")       the warning; without it, that all is well
    """

    def __init__(self, name: str):
        self.name = name
        self._faults: list[Verdict] = []
        self._warnings: list[Verdict] = []
        self._skipped: list[Verdict] = []

    def fault(self, who: str, finding: str, way_out: str = "") -> None:
        """A host, a rank or a pair of hosts has a fault."""
        verdict = self._verdict(Level.FAULT, f"{who}: {finding}", way_out)
        self._faults.append(verdict)

    def warn(self, who: str, finding: str, way_out: str = "") -> None:
        """A host, a rank or a pair of hosts is warned of."""
        verdict = self._verdict(Level.WARNING, f"{who}: {finding}", way_out)
        self._warnings.append(verdict)

    def skip(self, reason: str) -> None:
        """There is nothing to look at."""
        verdict = self._verdict(Level.SKIPPED, reason)
        self._skipped.append(verdict)

    def conclude(self, finding: str) -> list[Verdict]:
        """The verdicts, faults first; or one that all is well, with a finding.

        The first few have a line of their own, and one line counts the others.
        """
        if self._skipped:
            return self._skipped
        verdicts = self._faults + self._warnings
        if not verdicts:
            return [self._verdict(Level.OK, finding)]
        shown = verdicts[:_NAMED]
        others = verdicts[_NAMED:]
        if others:
            count = len(others)
            rest = f"and {count} more like these (--json has all)"
            level = others[0].level
            shown.append(self._verdict(level, rest))
        return shown

    def _verdict(
        self, level: Level, finding: str, way_out: str = ""
    ) -> Verdict:
        return Verdict(self.name, level, finding, way_out)


def has_fault(verdicts: list[Verdict]) -> bool:
    """Whether any of them is a fault."""
    return any(verdict.level is Level.FAULT for verdict in verdicts)
