"""Writes the tables of README.md anew from results/*.json.

    python benchmarks/tables.py

Each stands between `<!-- NAME -->` and `<!-- /NAME -->` and comes from `table` of NAME.py;
nothing else in the file changes.
"""

import json
import sys
from pathlib import Path

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite import FOLDER, RESULTS, render

README = FOLDER / "README.md"


def main() -> None:
    README.write_text(
        rewritten(README.read_text(encoding="utf-8")), encoding="utf-8"
    )


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The text with every record's tables in it. Ends in one line where a record has no place."""
    for file in sorted(results.glob("*.json")):
        begin = f"<!-- {file.stem} -->"
        end = f"<!-- /{file.stem} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            sys.exit(
                f"error: the text has no {begin} … {end}, where the tables of {file.name} belong"
            )
        record = json.loads(file.read_text(encoding="utf-8"))
        tables = render(file.stem, record)
        text = f"{before}{begin}\n{tables}\n{end}{after}"
    return text


if __name__ == "__main__":
    main()
