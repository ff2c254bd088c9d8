"""Settings: how interaction logs are written, and which of their rows count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.errors import InputError

DOMAIN_COLUMN = "domain"
_DELIMITERS = {"\\t": "\t", "tab": "\t"}
_MOST_DELIMITER = 4  # bytes
_EMPTY = {
    "time_format": "give a format such as '%d/%m/%Y %H:%M', or leave it out",
    "items": "give a file, or leave it out",
}


@dataclass(frozen=True, kw_only=True)
class LogFormat:
    """How interaction logs are written, and which of their rows count.

    columns: the names of all columns, for files without a header line.
    delimiter: what divides the fields, where the file's ending does not say so.
    time_format: of times that are text, as strftime has it.
    where: an expression; only rows for which it holds count (`trainer.data.logs.row_filter`).
    items: a file that has the domain of every item, in `domain_column`.
    items_columns, items_delimiter: `columns` and `delimiter` of that file.
    bad_rows: stop at the first row that cannot be used, or skip such rows and count them.
    """

    user_column: str = "user_id"
    item_column: str = "item_id"
    domain_column: str = DOMAIN_COLUMN
    time_column: str = "timestamp"
    columns: Sequence[str] = ()
    delimiter: str | None = None
    time_format: str | None = None
    where: str | None = None
    items: str | None = None
    items_columns: Sequence[str] = ()
    items_delimiter: str | None = None
    bad_rows: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in ("columns", "items_columns"):
            names = _split_names(name, getattr(self, name))
            object.__setattr__(self, name, names)
        for name in ("delimiter", "items_delimiter"):
            delimiter = getattr(self, name)
            if delimiter is not None:
                delimiter = _DELIMITERS.get(delimiter, delimiter)
                _check_delimiter(name, delimiter)
                object.__setattr__(self, name, delimiter)
        for name, hint in _EMPTY.items():
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty: {hint}")
        if self.bad_rows not in ("stop", "skip"):
            raise InputError(
                f"bad_rows is {self.bad_rows!r}: give 'stop' or 'skip'"
            )
        if self.items is None and (self.items_columns or self.items_delimiter):
            raise InputError(
                "items_columns and items_delimiter are for a file of items: "
                "give --items, or leave them out"
            )

    @property
    def skips_bad_rows(self) -> bool:
        """Whether rows that cannot be used are left out."""
        return self.bad_rows == "skip"

    @property
    def column_by_role(self) -> dict[str, str]:
        """The columns' names by role: user, item, domain, time."""
        return {
            "user": self.user_column,
            "item": self.item_column,
            "domain": self.domain_column,
            "time": self.time_column,
        }

    def check_domain(self, name: str, domain: str | None) -> None:
        """Raises InputError where the one domain of the logs contradicts the rest.

        name: of the setting, for messages.
        """
        if domain is None:
            return
        if domain == "":
            raise InputError(
                f"{name} is empty: give the one domain of these logs a name"
            )
        if self.domain_column != DOMAIN_COLUMN:
            raise InputError(
                f"{name} is {domain!r} and domain_column is {self.domain_column!r}: "
                "one of them says what the domains are"
            )
        if self.items is not None:
            raise InputError(
                f"{name} is {domain!r} and items is {self.items}: "
                "one of them says what the domains are"
            )


def _split_names(setting: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns names that are a list, or one text with commas."""
    if isinstance(names, str):
        names = names.split(",")
    stripped = tuple(name.strip() for name in names)
    for name in stripped:
        if not name or stripped.count(name) > 1:
            raise InputError(
                f"{setting} is {','.join(stripped)}: "
                "give every column a name of its own"
            )
    return stripped


def _check_delimiter(setting: str, delimiter: str) -> None:
    """Raises InputError for what cannot divide fields."""
    size = len(delimiter.encode())
    if not 1 <= size <= _MOST_DELIMITER or set(delimiter) & set("\"'\r\n\0"):
        raise InputError(
            f"{setting} is {delimiter!r}: give one sign or a few, "
            "such as ';', '|', '::' or tab"
        )
