"""Types and values of settings in words, for the reference and for `--help`."""

import dataclasses
import types
from typing import Any, Literal, get_args, get_origin

_NAMES = {
    bool: "on/off",
    int: "int",
    float: "number",
    str: "text",
}


def describe_type(kind: Any) -> str:
    """A setting's type in words: int, number, text, on/off, or its choices."""
    origin = get_origin(kind)
    members = get_args(kind)
    if origin is types.UnionType:
        names = []
        for member in members:
            if member is not types.NoneType:
                names.append(describe_type(member))
        return " or ".join(names)
    if origin is Literal:
        return ", ".join(map(str, members))
    if origin in (list, tuple):
        element = describe_type(members[0])
        return f"list of {element}"
    if origin is dict:
        return "section"
    return _NAMES[kind]


def describe_value(value: Any) -> str:
    """A default as one writes it; a dash for nothing."""
    if value is dataclasses.MISSING:
        return "needed"
    if value is None or value in ("", [], (), {}):
        return "–"
    if value is True:
        return "on"
    if value is False:
        return "off"
    if isinstance(value, list | tuple):
        elements = ", ".join(map(str, value))
        return f"[{elements}]"
    return str(value)
