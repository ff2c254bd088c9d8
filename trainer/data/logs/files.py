"""The files of logs: which are read, in which format, and what their folders' names say.

    logs/day=1/a.csv          a log, whose rows may have a column `day`
    logs/day=1/b.parquet      a log
    logs/_temporary/c.csv     hidden, as Spark and Arrow have it: names that begin with _ or a dot
    logs/readme.txt           passed over, and said

A folder is searched through, links included. In it only endings that leave no doubt are logs;
a file that is named may also be one of NAMED_ALONE.
"""

import glob
import os
import sys
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import InputError

Kind = Literal["parquet", "delimited", "json"]

# The kind of each ending, and what divides the fields.
_FORMATS: dict[str, tuple[Kind, str]] = {
    ".parquet": ("parquet", ""),
    ".pq": ("parquet", ""),
    ".csv": ("delimited", ","),
    ".tsv": ("delimited", "\t"),
    ".inter": ("delimited", "\t"),
    ".jsonl": ("json", ""),
    ".ndjson": ("json", ""),
}
# Endings that other files have, too: such a file is a log where it is named.
NAMED_ALONE: dict[str, tuple[Kind, str]] = {
    ".json": ("json", ""),
    ".dat": ("delimited", "::"),
    ".data": ("delimited", "\t"),
    ".txt": ("delimited", "\t"),
    ".item": ("delimited", "\t"),
}
COMPRESSIONS = {"": "none", ".gz": "gzip", ".zst": "zstd"}
ENDINGS = ", ".join([*_FORMATS, *NAMED_ALONE])
_DATASET = "dataset.json"  # of a prepared dataset
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SHOWN = 5  # files in a message


@dataclass(frozen=True)
class FileFormat:
    """How a file is written. delimiter: by the file's ending; empty for what has none."""

    kind: Kind
    delimiter: str
    compression: str  # as DuckDB names it


@dataclass(frozen=True, order=True)
class LogFile:
    """A log, and the columns that its folders' names give: (name, value) of each key=value."""

    path: Path
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def format(self) -> FileFormat:
        """How the file is written."""
        file_format = format_of(self.path)
        if file_format is None:
            raise AssertionError(f"{self.path} is no log")
        return file_format

    @property
    def state(self) -> list[str | int]:
        """What tells one state of the file from another."""
        return file_state(self.path)


def file_state(file: Path) -> list[str | int]:
    """Returns what tells one state of a file from another: path, size, time of change."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def format_of(path: Path, named: bool = True) -> FileFormat | None:
    """Returns the format that a file's name says; None for no log.

    named: the file is named, in place of found in a folder.

        a.parquet         parquet
        a.CSV, a.csv.gz   delimited by a comma, compressed by gzip
        ratings.dat       delimited by ::, where it is named; else None
        a.parquet.gz      None: Parquet compresses by itself
    """
    name = path.name.lower()
    formats = dict(_FORMATS)
    if named:
        formats |= NAMED_ALONE
    for ending, compression in COMPRESSIONS.items():
        if not name.endswith(ending):
            continue
        _, dot, suffix = name.removesuffix(ending).rpartition(".")
        kind, delimiter = formats.get(dot + suffix, (None, ""))
        if kind is not None and not (kind == "parquet" and ending):
            return FileFormat(kind, delimiter, compression)
    return None


def is_hidden(name: str) -> bool:
    """Returns whether readers of folders pass a name over: _x and .x, but not _x=1."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def find_logs(
    inputs: Iterable[str | Path], verbose: bool = False
) -> list[LogFile]:
    """Finds the logs behind paths, folders and globs, sorted, each once.

    Of the folder in the head of this module:

        LogFile(logs/day=1/a.csv, (("day", "1"),))
        LogFile(logs/day=1/b.parquet, (("day", "1"),))

    verbose: names on stderr what is passed over in folders.
    Raises InputError: a path that does not exist, a folder without logs, a named file that is
    no log, an empty file.
    """
    logs: dict[str, LogFile] = {}
    for text in inputs:
        if not str(text):
            raise InputError(
                "an input is empty: give a file, a folder or a glob"
            )
        passed_over: list[Path] = []
        for log in _find_logs_behind(text, passed_over):
            # A link to a file that is read, too, is that file.
            logs.setdefault(os.path.realpath(log.path), log)
        if passed_over and verbose:
            names = _list_names(passed_over)
            print(f"{text}: passed over, no logs: {names}", file=sys.stderr)
    for log in logs.values():
        if log.path.stat().st_size == 0:
            raise InputError(
                f"{log.path} is empty (0 bytes): remove it or write it again"
            )
    return sorted(logs.values())


def _find_logs_behind(
    text: str | Path, passed_over: list[Path]
) -> list[LogFile]:
    """Finds the logs behind one path, folder or glob."""
    path = Path(text)
    paths = [path]
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"input {text} is a link to {os.readlink(path)}, which does not exist"
        )
    if not path.exists():
        matches = glob.glob(str(text), recursive=True)
        paths = sorted(Path(match) for match in matches)
    if not paths:
        raise InputError(
            f"input {text} does not exist: give a file, a folder or a glob"
        )
    logs = []
    for path in paths:
        if path.is_dir():
            for file in _walk(path, passed_over):
                logs.append(_log_file(file))
        elif format_of(path, named=path == Path(text)) is not None:
            logs.append(_log_file(path))
        elif path == Path(text):
            raise InputError(
                f"input {text} is no log: the name must end in {ENDINGS}, "
                "text also with .gz or .zst behind it"
            )
        else:
            passed_over.append(path)
    if not logs:
        there = ""
        if passed_over:
            there = f"; it has {_list_names(passed_over)}"
        endings = ", ".join(_FORMATS)
        raise InputError(
            f"input {text} holds no log{there}: names must end in {endings}; "
            "name other files one by one"
        )
    return logs


def _walk(folder: Path, passed_over: list[Path]) -> Iterator[Path]:
    """Yields the logs in a folder, links followed, each folder once."""
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(
        folder, onerror=_refuse_unreadable, followlinks=True
    ):
        keep = []
        for name in sorted(folders):
            path = Path(parent) / name
            real = os.path.realpath(path)
            if is_hidden(name) or real in seen:
                continue
            seen.add(real)
            if (path / _DATASET).is_file():
                passed_over.append(path)
            else:
                keep.append(name)
        folders[:] = keep
        for name in sorted(names):
            path = Path(parent) / name
            if is_hidden(name):
                continue
            if format_of(path, named=False) is None:
                passed_over.append(path)
                continue
            if not path.exists():
                raise InputError(
                    f"{path} is a link to {os.readlink(path)}, which does not "
                    "exist: remove it or bring the file"
                )
            if path.is_file():
                yield path


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be read: {error.strerror}"
    ) from None


def _log_file(path: Path) -> LogFile:
    return LogFile(Path(os.path.abspath(path)), partitions_of(path))


def partitions_of(path: Path) -> tuple[tuple[str, str | None], ...]:
    """Returns the columns that folders' names give, as Hive writes them.

    out/domain=books%2C films/part-0.parquet gives (("domain", "books, films"),).
    """
    partitions = {}
    for name in path.parts[:-1]:
        key, sign, value = name.partition("=")
        if not sign or not key:
            continue
        text = urllib.parse.unquote(value)
        partitions[urllib.parse.unquote(key)] = (
            None if text == _HIVE_NULL else text
        )
    return tuple(partitions.items())


def _list_names(paths: list[Path]) -> str:
    """Returns a few names, and how many more there are."""
    names = ", ".join(path.name for path in paths[:_SHOWN])
    if len(paths) > _SHOWN:
        names += f" and {len(paths) - _SHOWN} more"
    return names
