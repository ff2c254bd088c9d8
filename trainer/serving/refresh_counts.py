"""Brings the counts of an exported folder up to date with newer logs, without training or PyTorch.

What is newer than the folder's newest counted event is counted (trainer/serving/newer_events.py), and
the offsets of all items are written anew, FAISS indices with them. Encoders, item vectors and ids
stay what they are: they are links to the same files, or copies where the file system has no links.

The folder is there whole or not at all: a new one is renamed to its place, and one that is brought
up to date in its place is exchanged in one move.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.serving import RefreshConfig
from trainer.errors import InputError
from trainer.files.atomic import exchange_folders, flush_tree
from trainer.files.lock import lock_folder
from trainer.files.progress import Stages
from trainer.files.staged import new_output_folder
from trainer.serving.exported_counts import (
    ExportedCounts,
    read_exported_counts,
)
from trainer.serving.faiss_index import INDEX, make_index, write_index
from trainer.serving.item_offsets import (
    COUNTS,
    OFFSETS,
    RECENCY,
    write_offsets,
)
from trainer.serving.newer_events import NewerCounts, count_newer
from trainer.serving.schema import SCHEMA, describe_files, write_schema

# Of the folder's files: written anew, or not to be carried along.
_NOT_LINKED = (
    SCHEMA,
    COUNTS,
    OFFSETS,
    INDEX,
    "__pycache__",
)


def refresh_counts(
    folder: str | Path,
    config: RefreshConfig,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Counts what is newer in the logs, and writes the folder with offsets of the newest counts.

    output: a folder that does not exist yet; None: in the place of `folder`. Returns what was
    counted: events, older, unknown_items, unknown_domains, until, as_of.

    Raises InputError where the folder is no export with the recency term, where another refresh
    replaces it meanwhile, where nothing in the logs is newer than what it counts, and for whatever
    is wrong with the logs.
    """
    folder = Path(os.path.realpath(folder))
    with _locked(folder, output):
        export = read_exported_counts(folder)
        with (
            _written_folder(folder, output) as (fresh, scratch),
            Stages(True) as stages,
        ):
            newer = count_newer(
                export,
                config,
                scratch,
                stages,
            )
            with stages("writing the offsets"):
                _write_folder(export, newer, fresh)
    return newer.to_record()


@contextlib.contextmanager
def _locked(folder: Path, output: str | Path | None) -> Iterator[None]:
    """Within it no other refresh replaces the folder: each goes on from the counts that it read.

    Raises InputError where another one is at work in its place.
    """
    if output is not None or not folder.is_dir():
        yield
        return
    with lock_folder(folder) as is_ours:
        if not is_ours:
            raise InputError(
                f"{folder}: another refresh replaces it: wait for that, and give this one again"
            )
        yield


def _write_folder(
    export: ExportedCounts, newer: NewerCounts, fresh: Path
) -> None:
    """Writes the export with the new counts into an empty folder."""
    index = export.schema.get("faiss")
    if index:
        make_index(index, 8)
    shutil.copytree(
        export.folder,
        fresh,
        copy_function=_link,
        ignore=shutil.ignore_patterns(*_NOT_LINKED),
        dirs_exist_ok=True,
    )
    names = []
    for domain, counts_NJ in zip(export.domains, newer.counts, strict=True):
        offset_N = export.formula.offsets(counts_NJ, domain.weights)
        path = fresh / domain.folder
        write_offsets(path, counts_NJ, offset_N)
        names.append(f"{domain.folder}/{COUNTS}")
        names.append(f"{domain.folder}/{OFFSETS}")
        if index:
            write_index(path, index)
            names.append(f"{domain.folder}/{INDEX}")
    schema = dict(export.schema)
    schema[RECENCY] |= newer.moment.to_record()
    schema["files"] |= describe_files(fresh, names)
    write_schema(fresh, schema)


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
            dir=folder.parent,
            prefix=f".{folder.name}.",
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
            f"{folder}: cannot be replaced in one move ({error.strerror}): make room, or give "
            "--output a new folder"
        ) from None


def _link(source: str, target: str) -> None:
    """Links a file, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
