"""Brings the counts of an exported folder up to date with newer logs, without training or PyTorch.

What is newer than the folder's newest counted event is counted (trainer/serving/item_offsets.py), and
the offsets of all items are written anew, FAISS indices with them. Encoders, item vectors and ids
stay what they are: they are links to the same files, or copies where the file system has no links.

The folder is there whole or not at all: a new one is renamed to its place, and one that is brought
up to date in its place is exchanged in one move.

Legend of shapes: N items of a domain, J half-lives, K items and days of the logs.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.prepare import UNKNOWN
from trainer.config.serving import RefreshConfig
from trainer.data.log_times import LogTimes, guess_unit
from trainer.errors import InputError
from trainer.files.atomic import exchange_folders, flush_tree
from trainer.files.progress import Stages
from trainer.files.staged import new_output_folder
from trainer.serving.faiss_index import INDEX, make_index, write_index
from trainer.serving.item_offsets import (
    COUNTS,
    OFFSETS,
    RECENCY,
    CountMoment,
    OffsetFormula,
    read_weights,
    write_offsets,
)
from trainer.serving.newer_events import (
    ExportedDomain,
    NewerCounts,
    count_dataset,
    count_logs,
    find_dataset,
)
from trainer.serving.schema import SCHEMA, describe_files, write_schema

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def refresh_counts(
    folder: str | Path,
    config: RefreshConfig,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Counts what is newer in the logs, and writes the folder with offsets of the newest counts.

    output: a folder that does not exist yet; None: in the place of `folder`. Returns what was
    counted: events, older, unknown_items, unknown_domains, until, as_of.

    Raises InputError where the folder is no export with the recency term, where nothing in the logs
    is newer than what it counts, and for whatever is wrong with the logs.
    """
    folder = Path(os.path.realpath(folder))
    export = ExportedCounts.read(folder)
    with (
        _written_folder(folder, output) as (fresh, scratch),
        Stages(True) as stages,
    ):
        newer = export.count(config, scratch, stages)
        with stages("writing the offsets"):
            export.write(newer, fresh)
    return newer.to_record()


@dataclass(frozen=True)
class ExportedCounts:
    """What an exported folder says of its counts."""

    folder: Path
    schema: dict[str, Any]
    moment: CountMoment
    formula: OffsetFormula
    domains: list[ExportedDomain]

    @classmethod
    def read(cls, folder: Path) -> "ExportedCounts":
        """Reads a folder's schema and ids. Raises InputError."""
        file = folder / SCHEMA
        try:
            schema = json.loads(file.read_text(encoding="utf-8"))
            section = schema.get(RECENCY)
            if section is None:
                raise InputError(
                    f"{folder}: was exported without the recency term: export the run with "
                    "--recency-term"
                )
            moment = CountMoment.from_record(section)
            formula = OffsetFormula.from_record(section)
            domains = []
            for entry in schema["domains"]:
                if not re.fullmatch(r"domain-\d+", entry["folder"]):
                    raise ValueError(f"{entry['folder']!r} is no folder")
                read_weights(entry[RECENCY], len(formula.half_lives))
                path = folder / entry["folder"]
                _check_files(folder, schema, entry["folder"])
                domains.append(
                    ExportedDomain.read(path, entry["name"], entry["items"])
                )
        except _UNREADABLE as error:
            reason = str(error)
            if isinstance(error, KeyError):
                reason = f"it has no {error}"
            raise InputError(
                f"{file}: cannot be used ({reason}): export the run again"
            ) from None
        return cls(folder, schema, moment, formula, domains)

    @property
    def log_times(self) -> LogTimes:
        """The kind of the times that are counted."""
        kind = self.schema.get("time_kind") or UNKNOWN
        unit = self.schema.get("time_unit") or guess_unit(self.moment.until)
        return LogTimes(kind, unit)

    def count(
        self, config: RefreshConfig, scratch: Path, stages: Stages
    ) -> NewerCounts:
        """The counts with what is newer. Raises InputError."""
        counts = [self._read_counts(domain) for domain in self.domains]
        before = NewerCounts(self.moment, counts)
        dataset = find_dataset(config.inputs)
        if dataset is not None:
            return count_dataset(
                dataset,
                before,
                self.formula,
                self.domains,
                self.log_times,
                stages,
            )
        return count_logs(
            config,
            before,
            self.formula,
            self.domains,
            self.log_times,
            scratch,
            stages,
        )

    def write(self, newer: NewerCounts, fresh: Path) -> None:
        """Writes the folder with the new counts into an empty one."""
        index = self.schema.get("faiss")
        if index:
            make_index(index, 8)
        rewritten = [SCHEMA, COUNTS, OFFSETS, INDEX, "__pycache__"]
        shutil.copytree(
            self.folder,
            fresh,
            copy_function=_link,
            ignore=shutil.ignore_patterns(*rewritten),
            dirs_exist_ok=True,
        )
        names = []
        for domain, counts_NJ in zip(self.domains, newer.counts, strict=True):
            entry = self._entry(domain)
            offset_N = self.formula.offsets(
                counts_NJ, entry[RECENCY]["weights"]
            )
            path = fresh / entry["folder"]
            write_offsets(path, counts_NJ, offset_N)
            written = [COUNTS, OFFSETS]
            if index:
                write_index(path, index)
                written.append(INDEX)
            names += [f"{entry['folder']}/{name}" for name in written]
        files = self.schema["files"] | describe_files(fresh, names)
        section = self.schema[RECENCY] | newer.moment.to_record()
        write_schema(fresh, self.schema | {RECENCY: section, "files": files})

    def _entry(self, domain: ExportedDomain) -> dict[str, Any]:
        """The schema's entry of a domain."""
        return self.schema["domains"][self.domains.index(domain)]

    def _read_counts(self, domain: ExportedDomain) -> np.ndarray:
        """A domain's counts, float64 (N, J). Raises InputError."""
        file = domain.folder / COUNTS
        try:
            counts_NJ = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{file}: cannot be read ({error}): export the run again"
            ) from None
        shape = (len(domain.ids), len(self.formula.half_lives))
        whole = counts_NJ.shape == shape and counts_NJ.dtype == np.float64
        if not whole or not np.isfinite(counts_NJ).all() or counts_NJ.min() < 0:
            raise InputError(
                f"{file}: is not counts of {shape[0]} items: export the run again"
            )
        return counts_NJ


def _check_files(folder: Path, schema: dict[str, Any], name: str) -> None:
    """Raises ValueError where what is read of a domain is not as it was exported."""
    for part in (COUNTS, "ids.safetensors"):
        file = f"{name}/{part}"
        found = describe_files(folder, [file])[file]
        if found != schema["files"][file]:
            raise ValueError(f"{file} is not as it was exported")


@contextlib.contextmanager
def _written_folder(
    folder: Path, output: str | Path | None
) -> Iterator[tuple[Path, Path]]:
    """Yields an empty folder that takes its place unless something is raised, and a scratch folder."""
    if output is not None:
        with new_output_folder(output) as folders:
            yield folders
        return
    try:
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}."
        ) as temporary:
            scratch = Path(temporary) / "scratch"
            scratch.mkdir()
            fresh = Path(temporary) / "folder"
            fresh.mkdir()
            yield fresh, scratch
            fresh.chmod(folder.stat().st_mode & 0o7777)
            flush_tree(fresh)
            # What was there is removed with the temporary folder.
            exchange_folders(fresh, folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be replaced in one move ({error.strerror}): give --output a new "
            "folder"
        ) from None


def _link(source: str, target: str) -> None:
    """Links a file, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
