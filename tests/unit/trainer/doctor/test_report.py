"""The table, whatever is in it."""

import io

from rich.console import Console

from trainer.doctor.report import summary, verdict_table
from trainer.doctor.verdict import Level, Verdict

VERDICTS = [
    Verdict("links", Level.FAULT, "a – b: " + "slow " * 60, "mend it"),
    Verdict("data", Level.WARNING, "\x1b[31m/da[bold]ta/" + "x" * 300),
    Verdict("clocks", Level.OK, "fine"),
]


def test_the_table_fits_and_steers_no_terminal():
    stream = io.StringIO()
    Console(file=stream, width=100).print(verdict_table(VERDICTS))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "[bold]" in text
    assert text.replace("\n", "").count("x") == 300
    assert summary(VERDICTS, 3.14) == "1 fault, 1 warning (3.1 s)"
