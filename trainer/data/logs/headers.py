"""The columns of text logs: the header line of delimited files, the keys of JSON.

user_id,item_id,rating          names
user_id:token<tab>rating:float  RecBole's: a type behind each name
1::31::2.5                      none: the names are given
{"user_id": 1, "rating": 2.5}   JSON Lines, an object a line; or one list of objects
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from trainer.data.logs.files import LogFile
from trainer.errors import InputError

_RECBOLE = re.compile(r"(.+):(token|token_seq|float|float_seq)")
_DELIMITERS = (",", ";", "|", "\t", "::")
_NAMES = {"\t": "tab"}  # of delimiters, in messages
_SAMPLE_LINES = 1000  # of JSON, whose keys are looked at
_LONGEST_SAMPLE = 1 << 20  # letters of a line of JSON
_LONGEST_LIST = 300  # letters of a list of columns
_READING_ERRORS = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    zlib.error,
    csv.Error,
    pa.ArrowException,
)


def quote_of(delimiter: str) -> str:
    """Returns the sign that a field with delimiters in it stands between; empty for none.

    Tab-separated values have none (IANA), nor have fields that several signs divide.
    """
    if delimiter == "\t" or len(delimiter) > 1:
        return ""
    return '"'


@contextlib.contextmanager
def open_text(path: Path, compression: str) -> Iterator[TextIO]:
    """Opens a text file, unpacked, without the mark of UTF-8 that may begin it."""
    if compression == "gzip":
        with gzip.open(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as unpacked:
            yield unpacked
    elif compression == "zstd":
        with pa.input_stream(str(path), compression="zstd") as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    else:
        with open(path, encoding="utf-8-sig", newline="") as text:
            yield text


def read_header(
    file: LogFile, delimiter: str, names: Sequence[str] = ()
) -> list[str]:
    """Returns the columns of a delimited file: those of its header line, or the given ones.

    Raises InputError where the first line has not as many fields as there are names, or the
    names themselves.
    """
    fields = _first_fields(file, delimiter)
    if not names:
        return _without_types(fields)
    if fields and len(fields) != len(names):
        raise InputError(
            f"{file.path}: its first line has {count_fields(len(fields))}, "
            f"{len(names)} columns are named{hint_of_delimiter(fields, delimiter)}"
        )
    if _without_types(fields) == list(names):
        raise InputError(
            f"{file.path}: its first line is a header: leave out --columns"
        )
    return list(names)


def count_fields(count: int) -> str:
    """Returns "1 field" or "3 fields"."""
    return f"{count} field{'s' * (count != 1)}"


def _first_fields(file: LogFile, delimiter: str) -> list[str]:
    """Returns the fields of the first line."""
    try:
        with open_text(file.path, file.format.compression) as stream:
            if quote_of(delimiter):
                return next(csv.reader(stream, delimiter=delimiter), [])
            line = stream.readline().rstrip("\r\n")
    except _READING_ERRORS as error:
        raise InputError(f"{file.path} cannot be read: {error}") from None
    return line.split(delimiter) if line else []


def _without_types(fields: list[str]) -> list[str]:
    """Returns names without RecBole's types, where all have one."""
    names = []
    for text in fields:
        match = _RECBOLE.fullmatch(text)
        if match is None:
            return fields
        names.append(match[1])
    return names


def hint_of_delimiter(fields: Sequence[str], delimiter: str) -> str:
    """Returns the way out where the fields of a first line look divided otherwise."""
    line = delimiter.join(fields)
    pieces = {}
    for other in _DELIMITERS:
        pieces[other] = len(line.split(other))
    # Of 1::2::3 the colons, not the empty text between them.
    best = max(_DELIMITERS, key=lambda one: (pieces[one], len(one)))
    if best == delimiter or pieces[best] <= max(2, len(fields)):
        return ""
    name = _NAMES.get(best, best)
    return f"; it looks divided by {name!r}: give --delimiter {name!r}"


def hint_of_header(fields: Sequence[str]) -> str:
    """Returns the way out where a first line looks like data."""
    for text in fields:
        if re.fullmatch(r"[+-]?[0-9.]+", text):
            return (
                "; its first line looks like data: name the columns "
                "with --columns"
            )
    return ""


@dataclass
class JsonKeys:
    """The keys of a JSON file's first objects.

    nested: those with lists or objects. is_list: the file is one list of objects.
    """

    names: dict[str, None] = field(default_factory=dict)
    nested: set[str] = field(default_factory=set)
    is_list: bool = False

    def add(self, record: dict[str, Any]) -> None:
        """Adds the keys of an object."""
        for name, value in record.items():
            self.names[name] = None
            if isinstance(value, list | dict):
                self.nested.add(name)


def read_json_keys(file: LogFile) -> JsonKeys:
    """Returns the keys of a JSON file's first objects."""
    keys = JsonKeys()
    try:
        with open_text(file.path, file.format.compression) as stream:
            _sample_keys(stream, keys)
    except _READING_ERRORS as error:
        raise InputError(f"{file.path} cannot be read: {error}") from None
    return keys


def _sample_keys(stream: TextIO, keys: JsonKeys) -> None:
    decoder = json.JSONDecoder()
    for _ in range(_SAMPLE_LINES):
        line = stream.readline(_LONGEST_SAMPLE)
        if not line:
            return
        text = line.strip()
        if text.startswith("[") and not keys.names:
            keys.is_list = True
            _add_keys_of_list(keys, decoder, text + stream.read(1 << 16))
            return
        with contextlib.suppress(ValueError):
            record = decoder.decode(text)
            if isinstance(record, dict):
                keys.add(record)


def _add_keys_of_list(
    keys: JsonKeys, decoder: json.JSONDecoder, text: str
) -> None:
    """Adds the keys of the first objects of a JSON list, of which there is the beginning."""
    position = text.find("{")
    while position >= 0:
        try:
            record, position = decoder.raw_decode(text, position)
        except ValueError:
            return
        keys.add(record)
        position = text.find("{", position)


def list_columns(names: Sequence[str]) -> str:
    """Returns the names of columns for a message."""
    text = ", ".join(names)
    if len(text) > _LONGEST_LIST:
        text = text[:_LONGEST_LIST] + "…"
    return text


def has_two_line_ends(file: LogFile) -> bool:
    """Returns whether some lines of a file end in CR LF and others in LF."""
    has_crlf = False
    has_lf = False
    with (
        contextlib.suppress(*_READING_ERRORS),
        open_text(file.path, file.format.compression) as stream,
    ):
        while text := stream.read(1 << 20):
            if text.endswith("\r"):
                text += stream.read(1)
            crlf = text.count("\r\n")
            has_crlf = has_crlf or crlf > 0
            has_lf = has_lf or text.count("\n") > crlf
            if has_crlf and has_lf:
                return True
    return False
