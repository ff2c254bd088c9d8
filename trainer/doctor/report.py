"""What an examination shows: a table, a line a verdict, and the same as JSON."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.doctor.facts import Examination
from trainer.doctor.judgement import count_levels
from trainer.doctor.verdict import Level, Verdict

_STYLES = {
    Level.OK: "green",
    Level.SKIPPED: "dim",
    Level.WARNING: "yellow",
    Level.FAULT: "bold red",
}


def verdict_table(verdicts: list[Verdict]) -> Table:
    """The verdicts as a table, whose last column is folded where it is too wide.

     check           verdict   finding
    ─────────────────────────────────────────────────────────────────────────
     shared memory   fault     host1: /dev/shm has 0.0 kB of 1.0 MB free, …
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for verdict in verdicts:
        level = Text(verdict.level.value, _STYLES[verdict.level])
        # Names of hosts and paths steer no terminal.
        finding = Text(_printable(verdict.text))
        table.add_row(Text(verdict.check), level, finding)
    return table


def _printable(text: str) -> str:
    """A text without what would steer a terminal, however long it is."""
    letters = []
    for letter in text:
        letters.append(letter if letter.isprintable() else " ")
    return "".join(letters)


def summary(verdicts: list[Verdict], seconds: float) -> str:
    """`1 fault, 2 warnings (3.1 s)`."""
    faults = count_levels(verdicts, Level.FAULT)
    warnings = count_levels(verdicts, Level.WARNING)
    parts = []
    for count, word in ((faults, "fault"), (warnings, "warning")):
        ending = "" if count == 1 else "s"
        parts.append(f"{count} {word}{ending}")
    return f"{', '.join(parts)} ({seconds:.1f} s)"


def as_record(
    examination: Examination, verdicts: list[Verdict]
) -> dict[str, Any]:
    """Verdicts and all that was found, as JSON has it."""
    lines = []
    for verdict in verdicts:
        line = asdict(verdict)
        line["level"] = verdict.level.name.lower()
        lines.append(line)
    return {"verdicts": lines, "found": asdict(examination)}
