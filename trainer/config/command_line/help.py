"""The settings of a configuration as the help of a command line."""

import dataclasses
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin

from trainer.config.changes import iterate_settings
from trainer.config.command_line.describe import describe_type, describe_value
from trainer.config.setting import default_of, help_of

HELP_COLUMN = 34  # where the help begins
_WIDEST = 100  # columns


def help_width() -> int:
    """The width of a help text: the terminal's, at most 100 columns."""
    terminal = shutil.get_terminal_size()
    return min(_WIDEST, terminal.columns)


def describe_settings(kind: type) -> str:
    """The settings of a configuration, each with its type, help and default; sections apart.

    settings, as key=VALUE or --key VALUE:
      epochs=INT                      passes over the training users (default: 20)

      model.dim=INT                   …
    """
    lines = ["settings, as key=VALUE or --key VALUE:"]
    for key, field in iterate_settings(kind):
        if dataclasses.is_dataclass(field.type):
            lines.append("")
        else:
            lines += _describe_setting(key, field)
    return "\n".join(lines)


def with_default(text: str, default: Any) -> str:
    """A help line that says the default, where it is more than nothing."""
    value = describe_value(default)
    if value == "–":
        return text
    return f"{text} (default: {value})".strip()


def _describe_setting(key: str, field: dataclasses.Field[Any]) -> list[str]:
    text = with_default(help_of(field), default_of(field))
    start = f"  {key}={_value_name(field.type)}"
    return _two_columns(start, text)


def _value_name(kind: Any) -> str:
    """A value as a help text names it: INT, {on,off}, [TEXT,…]."""
    if kind is bool:
        return "{on,off}"
    origin = get_origin(kind)
    if origin is Literal:
        choices = ",".join(map(str, get_args(kind)))
        return "{" + choices + "}"
    if origin in (list, tuple):
        element = get_args(kind)[0]
        return f"[{_value_name(element)},…]"
    if origin is dict:
        return "{KEY: VALUE,…}"
    return describe_type(kind).upper().replace(" OR ", "|")


def _two_columns(start: str, text: str) -> list[str]:
    """A line, or several, with the text from HELP_COLUMN on."""
    indent = " " * HELP_COLUMN
    lines = textwrap.wrap(
        text,
        help_width() - 2,
        initial_indent=indent,
        subsequent_indent=indent,
    )
    if not lines:
        return [start]
    if len(start) + 2 > HELP_COLUMN:
        return [start, *lines]
    first = lines.pop(0).lstrip()
    return [start.ljust(HELP_COLUMN) + first, *lines]
