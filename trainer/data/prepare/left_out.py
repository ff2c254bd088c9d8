"""What a preparation left out: rows, and small domains; the record of it in the dataset's folder.

    preparation.json   rows that were filtered out or bad, items without a domain, small domains
    bad_rows.jsonl     the bad rows, a line each

Both are there only where something was left out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.data.logs.reading import BAD_ROWS, RECORD
from trainer.files.staged import write_record

_DOMAINS = "left_out.json"  # of the stage `ids`
_COUNTS = ("filtered", "bad", "items_without_domain", "domains")


def record_left_out(
    folder: Path, before: dict[str, tuple[int, int]], left: set[str]
) -> None:
    """Records the small domains that were left out, in the folder of the stage `ids`.

    before: items and interactions by domain. left: the domains that stay.
    """
    domains = {}
    for name in sorted(before.keys() - left, key=str.encode):
        items, interactions = before[name]
        domains[name] = {"items": items, "interactions": interactions}
    text = json.dumps(domains, ensure_ascii=False)
    (folder / _DOMAINS).write_text(text, encoding="utf-8")


def keep_records(reading: Path, ids_folder: Path, folder: Path) -> None:
    """Writes what was left out into the dataset's folder. May be called again."""
    record = _read(reading / RECORD)
    record["domains"] = _read(ids_folder / _DOMAINS)
    if not any(record.get(name) for name in _COUNTS):
        return
    write_record(folder / RECORD, record)
    bad_rows = reading / BAD_ROWS
    if bad_rows.is_file():
        shutil.copyfile(bad_rows, folder / BAD_ROWS)


def read_left_out(dataset: Path) -> dict[str, Any]:
    """Reads what was left out of a dataset; empty for nothing."""
    return _read(dataset / RECORD)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))
