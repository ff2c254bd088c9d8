"""Redaction: texts that may be printed, without the secrets of addresses and without control characters."""

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import url2pathname

HIDDEN = "…"  # stands for what is secret
_ADDRESS = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_TEXT = 300  # letters
_QUERY = re.compile(r"(://[^?#\s]*)[?#]\S*")
_VALUES = re.compile(r"\?\S*=\S*")
# Variables whose values are secret, by their names.
_SECRET_NAME = re.compile(
    r"TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|SECRET|CREDENTIAL",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 6  # letters; hiding a shorter one would hide other words


def is_address(location: object) -> bool:
    """Whether a dataset's location is an address to fetch it from; otherwise it is a folder."""
    return _ADDRESS.match(str(location)) is not None


def find_local_folder(location: object) -> str | None:
    """The folder that a dataset's location names, also as `file:…`; None where it is an address."""
    text = str(location)
    if text.startswith("file:"):
        return url2pathname(urlsplit(text).path)
    if is_address(text):
        return None
    return text


def redact_for_record(location: object) -> str:
    """A dataset's location as a run records it: without secrets, and without a command."""
    if str(location).startswith("pipe:"):
        return f"pipe:{HIDDEN}"
    return redact_location(location)


def redact_location(location: object) -> str:
    """A dataset's location as it may be printed: an address loses user, password and query."""
    text = str(location)
    if not is_address(text):
        return text
    return _QUERY.sub(rf"\1?{HIDDEN}", hide_user(text))


def hide_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text of another program without secrets: of its addresses, and of the environment.

    Addresses lose user, password and query. Values of variables such as WANDB_API_KEY are hidden.
    """
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = _QUERY.sub(rf"\1?{HIDDEN}", hide_user(text))
    # Of an address whose beginning another program has cut off.
    return _VALUES.sub(f"?{HIDDEN}", text)


def hide_user(text: str) -> str:
    """A text whose addresses have no user and no password any more."""
    # It rather hides too much than a part of a password.
    return re.sub(r"://\S*@", f"://{HIDDEN}@", text)


def printable_text(message: object) -> str:
    """A message of an exception or another side, short, on one line, and harmless to a terminal."""
    text = " ".join(printable_letters(message).split())
    return text[:_LONGEST_TEXT] or type(message).__name__


def printable_letters(message: object) -> str:
    """A message, however long, with a blank for each letter that would steer a terminal."""
    letters = []
    for letter in str(message):
        letters.append(letter if letter.isprintable() else " ")
    return "".join(letters)
