"""What became of the rows of logs: read, left out by an expression, or bad and skipped."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.files.staged import write_record

RECORD = "preparation.json"
BAD_ROWS = "bad_rows.jsonl"
MOST_LISTED = 100_000  # bad rows in BAD_ROWS; all are counted
NAMED = 5  # in messages


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. row: from 1, the header not counted; None in a table."""

    file: str
    row: int | None
    reason: str

    def __str__(self) -> str:
        """As a message has it: FILE: row 3: 'user_id' is empty."""
        number = "" if self.row is None else f" row {self.row}:"
        return f"{self.file}:{number} {self.reason}"


@dataclass
class Reading:
    """What became of the rows of logs.

    dates: their times are dates. filtered: rows left out by the expression of `where`.
    bad: skipped rows by reason; bad_rows: the first of them. unknown_items: events by item of
    the items that the file of items lacks.
    """

    dates: bool = False
    rows: int = 0
    filtered: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_rows: list[BadRow] = field(default_factory=list)
    unknown_items: dict[str, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every row counts."""
        return not (self.filtered or self.bad or self.unknown_items)

    def add_bad(self, reason: str, count: int) -> None:
        """Counts bad rows."""
        if count:
            self.bad[reason] = self.bad.get(reason, 0) + count

    def list_bad(self, rows: Iterable[BadRow]) -> None:
        """Lists bad rows that were counted, as far as there is room."""
        for row in rows:
            if len(self.bad_rows) >= MOST_LISTED:
                return
            self.bad_rows.append(row)

    def require_rows(self, files: list[str]) -> None:
        """Raises InputError where no row is left."""
        if self.rows:
            return
        logs = files[0]
        if len(files) > 1:
            logs += f" and {len(files) - 1} more"
        if self.filtered:
            raise InputError(
                f"{logs}: no row is left: where leaves all {self.filtered:,} out"
            )
        raise InputError(f"{logs}: no rows, nothing to prepare")

    def refuse_unknown_items(self, items: str) -> None:
        """Raises InputError where items of the logs have no line in the file of items."""
        if not self.unknown_items:
            return
        count = len(self.unknown_items)
        rows = sum(self.unknown_items.values())
        named = ", ".join(list(self.unknown_items)[:NAMED])
        more = ", …" if count > NAMED else ""
        raise InputError(
            f"{items}: has no domain for {count:,} of the logs' items, which have "
            f"{rows:,} rows: {named}{more}: add them, or leave their rows out "
            "with --bad-rows skip"
        )

    def save(self, folder: Path) -> None:
        """Writes the record, and the bad rows if there are any, into a folder.

        A line of each kind in the list of bad rows:

            {"file": "log.csv", "row": 433, "reason": "'domain' is empty"}
            {"item": "B07", "rows": 12, "reason": "has no domain"}
        """
        record: dict[str, Any] = {
            "rows": self.rows,
            "filtered": self.filtered,
            "bad": dict(sorted(self.bad.items())),
            "items_without_domain": len(self.unknown_items),
            "rows_without_domain": sum(self.unknown_items.values()),
        }
        write_record(folder / RECORD, record)
        if not (self.bad_rows or self.unknown_items):
            return
        with open(folder / BAD_ROWS, "w", encoding="utf-8") as stream:
            for row in sorted(self.bad_rows, key=_place):
                line = dataclasses.asdict(row)
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            for item, rows in self.unknown_items.items():
                line = {"item": item, "rows": rows, "reason": "has no domain"}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _place(row: BadRow) -> tuple[str, int]:
    """Where a row stands: its file, and its number there."""
    return row.file, row.row or 0
