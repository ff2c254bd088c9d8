"""The counts that an exported folder holds (trainer/serving/item_offsets.py), read back and checked.

    schema.json                 the day, the half-lives and the weights
    domain-N/ids.safetensors    whose counts they are
    domain-N/counts.npy         the counts

What is read is as it was exported, by its sha256. No PyTorch is needed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file

from trainer.config.prepare import UNKNOWN
from trainer.data.log_times import LogTimes, guess_unit
from trainer.errors import InputError
from trainer.serving.item_offsets import (
    COUNTS,
    RECENCY,
    CountMoment,
    OffsetFormula,
    read_weights,
)
from trainer.serving.schema import SCHEMA, describe_files

_IDS = "ids.safetensors"
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True)
class ExportedDomain:
    """A domain of an exported folder.

    folder: its name in the export. ids: its items' as texts, in the order of their vectors.
    weights: w, (J,). counts_NJ: float64, of each item with each half-life.

    Of three items and two half-lives:

        ids          "a"      "b"      "c"
        counts_NJ    0.5 3    0   0    2.1 2.2
    """

    folder: str
    name: str
    ids: pa.LargeStringArray
    weights: list[float]
    counts_NJ: np.ndarray


@dataclass(frozen=True)
class ExportedCounts:
    """The counts of an exported folder, and how they become offsets."""

    folder: Path
    schema: dict[str, Any]
    moment: CountMoment
    formula: OffsetFormula
    domains: list[ExportedDomain]

    @property
    def log_times(self) -> LogTimes:
        """The kind of the times that are counted."""
        kind = self.schema.get("time_kind") or UNKNOWN
        unit = self.schema.get("time_unit")
        if not unit:
            unit = guess_unit(self.moment.until)
        return LogTimes(kind, unit)


def read_exported_counts(folder: Path) -> ExportedCounts:
    """Reads the counts of an exported folder.

    Raises InputError where it is no export with the recency term, or is not as it was exported.
    """
    file = folder / SCHEMA
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
        if RECENCY not in schema:
            raise InputError(
                f"{folder}: was exported without the recency term: export the run with "
                "--recency-term"
            )
        section = schema[RECENCY]
        moment = CountMoment.from_record(section)
        formula = OffsetFormula.from_record(section)
        half_lives = len(formula.half_lives)
        domains = []
        for entry in schema["domains"]:
            domain = _read_domain(
                folder,
                entry,
                schema["files"],
                half_lives,
            )
            domains.append(domain)
    except _UNREADABLE as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"it has no {error}"
        raise InputError(
            f"{file}: cannot be used ({reason}): export the run again"
        ) from None
    return ExportedCounts(
        folder,
        schema,
        moment,
        formula,
        domains,
    )


def _read_domain(
    folder: Path,
    entry: dict[str, Any],
    files: dict[str, Any],
    half_lives: int,
) -> ExportedDomain:
    """Reads a domain's ids and counts. Raises one of _UNREADABLE."""
    name = entry["folder"]
    if not re.fullmatch(r"domain-\d+", name):
        raise ValueError(f"{name!r} is no folder")
    for part in (COUNTS, _IDS):
        file = f"{name}/{part}"
        found = describe_files(folder, [file])
        if found[file] != files[file]:
            raise ValueError(f"{file} is not as it was exported")
    ids = _read_ids(folder / name)
    counts_NJ = np.load(folder / name / COUNTS, allow_pickle=False)
    shape = (entry["items"], half_lives)
    if (len(ids), half_lives) != shape or counts_NJ.shape != shape:
        raise ValueError(f"{name} is not of {entry['items']} items")
    if counts_NJ.dtype != np.float64 or not (counts_NJ >= 0).all():
        raise ValueError(f"{name}/{COUNTS} is no counts")
    weights = read_weights(entry[RECENCY], half_lives)
    return ExportedDomain(
        name,
        entry["name"],
        ids,
        weights,
        counts_NJ,
    )


def _read_ids(folder: Path) -> pa.LargeStringArray:
    """A domain's ids, without a copy."""
    stored = load_file(folder / _IDS)
    offsets = stored["offsets"]
    return pa.LargeStringArray.from_buffers(
        len(offsets) - 1,
        pa.py_buffer(offsets),
        pa.py_buffer(stored["bytes"]),
    )
