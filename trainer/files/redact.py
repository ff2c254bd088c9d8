"""Texts that may be printed: addresses without their secrets, and what somebody else has said."""

import re
from urllib.parse import urlsplit
from urllib.request import url2pathname

_HIDDEN = "…"  # stands for what is secret


def is_address(place) -> bool:
    """Whether a dataset's place is an address to fetch it from; otherwise it is a folder."""
    return re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def folder_of(place) -> str | None:
    """The folder that a dataset's place names, also as `file:…`; None where it is an address."""
    if str(place).startswith("file:"):
        return url2pathname(urlsplit(str(place)).path)
    return None if is_address(place) else str(place)


def recorded(place) -> str:
    """A dataset's place as a run keeps it: without what is secret, and without a command."""
    return f"pipe:{_HIDDEN}" if str(place).startswith("pipe:") else shown(place)


def shown(place) -> str:
    """A dataset's place as it may be printed: without user, password and query of an address."""
    return (
        re.sub(r"(://[^?#\s]*)[?#]\S*", rf"\1?{_HIDDEN}", _without_user(str(place)))
        if is_address(place)
        else str(place)
    )


def _without_user(text):
    return re.sub(
        r"://\S*@", f"://{_HIDDEN}@", text
    )  # rather too much than a part of a password


def words(said) -> str:
    """What an exception or another side says: short, on one line, with nothing in it that steers a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(said))
    return " ".join(text.split())[:300] or type(said).__name__
