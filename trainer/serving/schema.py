"""The schema of an exported folder: schema.json, which names its files. Light: no PyTorch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.data.format.dataset import File

SCHEMA = "schema.json"


def write_schema(folder: Path, schema: dict[str, Any]) -> None:
    """Writes an export's schema into its folder."""
    text = json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    (folder / SCHEMA).write_text(text, encoding="utf-8")


def describe_files(
    folder: Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of some files, by their names in the folder."""
    files = {}
    for name in names:
        file = File.of(folder, name)
        files[name] = {"bytes": file.bytes, "sha256": file.sha256}
    return files
