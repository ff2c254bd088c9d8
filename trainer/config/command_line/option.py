"""An option of a command line, made from the field of a dataclass."""

import argparse
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, cast, get_args, get_origin

from trainer.config.command_line.help import with_default
from trainer.config.setting import default_of, help_of, setting

_VALUE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT"}


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    flags: tuple[str, ...] = (),
    **metadata: Any,
) -> Any:
    """A field that becomes an option; without a default it is needed.

    flags: more spellings, e.g. ("--of",). metadata:

        metavar       what the help calls a value
        repeat        True: a list that gets a value from each repetition of the flag
        bare          the value of the flag where none follows
        choices       the values that there are
        settings_of   the configuration whose settings the field gets, as key=value
    """
    metadata["flags"] = flags
    if default is dataclasses.MISSING:
        metadata["help"] = help
        return dataclasses.field(metadata=metadata)
    return setting(default, help, **metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command line.

    For `base: list[str] = option("a YAML", list, repeat=True)` that is

        name      "base"
        flags     ("--base",)
        kind      str
        several   True
        default   []
        metadata  {"help": "a YAML", "repeat": True, …}
    """

    name: str  # the key, which is the field's name
    flags: tuple[str, ...]
    kind: Any  # the type of one value
    several: bool  # whether it is a list
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag to which all spellings are rewritten."""
        return self.flags[0]

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.kind is bool

    @property
    def is_repeated(self) -> bool:
        """Whether it is a list that gets a value from each repetition of the flag."""
        return self.metadata.get("repeat", False)

    @property
    def takes_list(self) -> bool:
        """Whether all words up to the next flag are its values."""
        return self.several and not self.is_repeated

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The values that there are, where they are a few."""
        if get_origin(self.kind) is Literal:
            return get_args(self.kind)
        return self.metadata.get("choices")

    def has_flag(self, flag: str) -> bool:
        """Whether a word is one of its flags."""
        dashed = with_dashes(flag)
        return dashed in map(with_dashes, self.flags)

    def has_flag_from(self, start: str) -> bool:
        """Whether a word is the beginning of one of its flags."""
        dashed = with_dashes(start)
        return any(with_dashes(own).startswith(dashed) for own in self.flags)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the option to an argparse parser."""
        text = self._help()
        if self.is_switch:
            parser.add_argument(
                *self.flags,
                dest=self.name,
                action="store_true",
                help=text,
            )
            return
        parser.add_argument(
            *self.flags,
            dest=self.name,
            help=text,
            type=self._converter(),
            choices=self.choices,
            **self._number_of_values(),
            **self._default(),
            **self._value_name(),
        )

    def _converter(self) -> type:
        if self.kind in (int, float):
            return self.kind
        return str

    def _number_of_values(self) -> dict[str, Any]:
        if self.takes_list:
            return {"nargs": "+"}
        if self.is_repeated:
            return {"action": "append"}
        if "bare" in self.metadata:
            return {"nargs": "?", "const": self.metadata["bare"]}
        return {}

    def _default(self) -> dict[str, Any]:
        if self.default is dataclasses.MISSING:
            return {"required": True}
        return {"default": self.default}

    def _value_name(self) -> dict[str, Any]:
        if self.choices is not None:
            return {}  # argparse shows them
        name = self.metadata.get("metavar")
        return {"metavar": name or _VALUE_NAMES[self.kind]}

    def _help(self) -> str:
        text = self.metadata["help"]
        if self.default is dataclasses.MISSING:
            text += " (needed)"
        elif self.is_repeated:
            text += " (repeatable)"
        elif not self.is_switch:
            text = with_default(text, self.default)
        return text.replace("%", "%%")


def options_of(kind: type) -> list[Option]:
    """The options of a dataclass; those of a dataclass in it are among them."""
    options = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            options += options_of(cast(type, field.type))
        elif "settings_of" not in field.metadata:
            options.append(_option_of(field))
    return options


def _option_of(field: dataclasses.Field[Any]) -> Option:
    kind = _without_none(field.type)
    several = get_origin(kind) in (list, tuple)
    if several:
        kind = get_args(kind)[0]
    metadata = dict(field.metadata)
    metadata["help"] = help_of(field)
    return Option(
        name=field.name,
        flags=_flags_of(field),
        kind=kind,
        several=several,
        default=default_of(field),
        metadata=metadata,
    )


def _flags_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """`--` and the field's name, and the other spellings."""
    flags = field.metadata.get("flags", ())
    own = "--" + with_dashes(field.name)
    for flag in flags:
        if with_dashes(flag) == own:
            return flags
    return (own, *flags)


def _without_none(kind: Any) -> Any:
    """The type beside None in `int | None`, or the type."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    for member in get_args(kind):
        if member is not types.NoneType:
            return member
    return kind


def with_dashes(word: str) -> str:
    """A flag or key in which - and _ are the same."""
    return word.replace("_", "-")
