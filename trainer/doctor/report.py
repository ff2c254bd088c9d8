"""What an examination shows: a table, a line a verdict, and the same as JSON."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.doctor.facts import Examination
from trainer.doctor.units import count_of
from trainer.doctor.verdict import Level, Verdict
from trainer.files.redact import printable_letters

_STYLES = {
    Level.OK: "green",
    Level.SKIPPED: "dim",
    Level.WARNING: "yellow",
    Level.FAULT: "bold red",
}


def verdict_table(verdicts: list[Verdict]) -> Table:
    """The verdicts as a table, whose last column is folded where it is too wide.

     check           verdict   finding
    ──────────────────────────────────────────────────────────────────────────
     ranks           ok        2 ranks on 2 hosts
     shared memory   fault     host1: /dev/shm has 0.0 kB of 1.0 MB free, its
                               loaders need 1.1 MB: empty it, or mount a larger one
     links           –         one host
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for verdict in verdicts:
        level = Text(verdict.level.value, _STYLES[verdict.level])
        finding = Text(printable_letters(verdict.text))
        table.add_row(Text(verdict.check), level, finding)
    return table


def summary(verdicts: list[Verdict], seconds: float) -> str:
    """`1 fault, 2 warnings (3.1 s)`."""
    levels = [verdict.level for verdict in verdicts]
    faults = count_of(levels.count(Level.FAULT), "fault")
    warnings = count_of(levels.count(Level.WARNING), "warning")
    return f"{faults}, {warnings} ({seconds:.1f} s)"


def as_record(
    examination: Examination, verdicts: list[Verdict]
) -> dict[str, Any]:
    """Verdicts and all that was found, as JSON has it.

    {
        "verdicts": [{"check": "ranks", "level": "ok", "finding": "2 ranks on …", "way_out": ""}, …],
        "found": {"ranks": [{"rank": 0, "host": "host0", …}, …], "links": […], …}
    }
    """
    lines = []
    for verdict in verdicts:
        line = asdict(verdict)
        line["level"] = verdict.level.name.lower()
        lines.append(line)
    return {"verdicts": lines, "found": asdict(examination)}
