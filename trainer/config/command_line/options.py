"""The command line of all scripts: a dataclass becomes options, `--flag value` and `key=value` alike.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        run: str = option("the folder of a finished run", flags=("--of",))
        split: Literal["test", "validation"] = option("the items to rank", "test")
        fresh: bool = option("begin anew", False)

    options = parse_options(Options, __doc__)

Then `--run DIR --fresh`, `run=DIR fresh=on` and `--run=DIR --fresh=on` are the same. A field that is
a dataclass gives its own fields as options. A field with `settings_of` gets the settings of a
configuration, `key=value` or `--key value`, as `key=value` for `trainer.config.load`.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
import types
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from trainer.config.command_line.help import (
    HELP_COLUMN,
    describe_settings,
    help_width,
    with_default,
)
from trainer.config.command_line.words import WordRewriter, dashed
from trainer.config.setting import default_of, help_of, setting

T = TypeVar("T")

PROGRAM = "syncrec-trainer"
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    flags: tuple[str, ...] = (),
    **metadata: Any,
) -> Any:
    """A field that becomes an option; without a default it is needed.

    flags: more spellings, e.g. ("--of",). metadata: `metavar`; `repeat=True` for a list that gets a
    value from each repetition; `bare` for the value of the flag alone; `settings_of` for the
    configuration whose settings the field gets; `choices`.
    """
    metadata["flags"] = flags
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={**metadata, "help": help})
    return setting(default, help, **metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command line."""

    name: str  # the key, which is the field's name
    flags: tuple[str, ...]  # the first one is shown
    kind: type  # of one value
    several: bool  # a list
    default: Any
    metadata: Any

    @property
    def takes_list(self) -> bool:
        """Whether all words up to the next flag are its values."""
        return self.several and not self.metadata.get("repeat", False)

    @property
    def flag(self) -> str:
        """The flag to which all spellings are rewritten."""
        return self.flags[0]

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The values that there are, where they are a few."""
        if get_origin(self.kind) is Literal:
            return get_args(self.kind)
        return self.metadata.get("choices")

    def has_flag(self, flag: str) -> bool:
        """Whether a word is one of its flags; - and _ are the same."""
        return dashed(flag) in [dashed(own) for own in self.flags]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds it to an argparse parser."""
        settings: dict[str, Any] = {"dest": self.name, "help": self._help()}
        if self.kind is bool:
            parser.add_argument(*self.flags, action="store_true", **settings)
            return
        settings["default"] = self.default
        if self.default is dataclasses.MISSING:
            settings["default"] = None
            settings["required"] = True
        settings["type"] = self.kind if self.kind in (int, float) else str
        settings["choices"] = self.choices
        if self.choices is None:
            settings["metavar"] = self.metadata.get("metavar") or _METAVARS[self.kind]
        if self.takes_list:
            settings["nargs"] = "+"
        elif self.several:
            settings["action"] = "append"
        elif "bare" in self.metadata:
            settings["nargs"] = "?"
            settings["const"] = self.metadata["bare"]
        parser.add_argument(*self.flags, **settings)

    def _help(self) -> str:
        text = self.metadata["help"]
        if self.default is dataclasses.MISSING:
            text += " (needed)"
        elif self.metadata.get("repeat", False):
            text += " (repeatable)"
        elif self.kind is not bool:
            text = with_default(text, self.default)
        return text.replace("%", "%%")


def parse_options(
    kind: type[T], description: str | None, arguments: Iterable[str] | None = None
) -> T:
    """The options of a script, as an instance of the dataclass `kind`.

    description: the script's docstring. arguments: None for those of this process. Ends the process
    with status 2, and a line on stderr, for an option that there is not.
    """
    options = options_of(kind)
    settings = _settings_field(kind)
    parser = _parser(options, settings, description or "")
    words = list(sys.argv[1:] if arguments is None else arguments)
    settings_kind = settings.metadata["settings_of"] if settings else None
    words = WordRewriter(options, settings_kind).rewrite(words)
    if settings is None:
        values = parser.parse_args(words)
    else:
        values = parser.parse_intermixed_args(words)
    return _build(kind, vars(values))


def options_of(kind: type) -> list[Option]:
    """The options of a dataclass; those of a dataclass in it are among them."""
    options = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            options += options_of(field.type)
        elif "settings_of" not in field.metadata:
            options.append(_option(field))
    return options


def _option(field: dataclasses.Field) -> Option:
    kind = _without_none(field.type)
    several = get_origin(kind) in (list, tuple)
    if several:
        kind = get_args(kind)[0]
    flags = list(field.metadata.get("flags", ()))
    own = "--" + dashed(field.name)
    if not any(dashed(flag) == own for flag in flags):
        flags.insert(0, own)
    return Option(
        name=field.name,
        flags=tuple(flags),
        kind=kind,
        several=several,
        default=default_of(field),
        metadata={**field.metadata, "help": help_of(field)},
    )


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            if member is not types.NoneType:
                return member
    return kind


def _settings_field(kind: type) -> dataclasses.Field | None:
    for field in dataclasses.fields(kind):
        if "settings_of" in field.metadata:
            return field
    return None


def _build(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of the values by name; dataclasses in it too."""
    arguments = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, values)
            continue
        value = values[field.name]
        if value is not None and get_origin(field.type) is tuple:
            value = tuple(value)
        arguments[field.name] = value
    return kind(**arguments)


def _parser(
    options: list[Option], settings: dataclasses.Field | None, description: str
) -> argparse.ArgumentParser:
    usage = "%(prog)s [--option VALUE | option=VALUE] …"
    epilog = None
    if settings is not None:
        usage += " [key=VALUE] …"
        epilog = describe_settings(settings.metadata["settings_of"])
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=_formatter,
    )
    for each in options:
        each.add_to(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parser.add_argument("--version", action="version", version=_version())
    if settings is not None:
        parser.add_argument(
            settings.name, nargs="*", metavar="key=VALUE", help=help_of(settings)
        )
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=HELP_COLUMN, width=help_width()
    )


def _version() -> str:
    try:
        return f"{PROGRAM} {importlib.metadata.version(PROGRAM)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PROGRAM}, a checkout that is not installed"
