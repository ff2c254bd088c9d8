"""The words of a command line, brought into the one form that argparse reads.

--fresh off         (nothing)                   the key of a switch, or its flag, with a value
fresh=on            --fresh
keep=3              --keep=3                    the key of an option
--least_users 5     --least-users 5             - and _ are the same
input=[a,b]         --input a b                 a list as YAML has it
--model.dim 64      model.dim=64                the key of a setting
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_origin

import yaml

from trainer.config.changes import iterate_settings

if TYPE_CHECKING:
    from trainer.config.command_line.options import Option

_TRUE = ("on", "true", "yes")
_FALSE = ("off", "false", "no")


class WordRewriter:
    """Brings the words of a command line into the one form that argparse reads."""

    def __init__(self, options: Sequence["Option"], settings_kind: type | None):
        """settings_kind: the configuration whose settings are words too; None: none are."""
        self.options = options
        self.settings = _setting_types(settings_kind)
        self.words: list[str] = []

    def rewrite(self, words: list[str]) -> list[str]:
        """Options as `--flag=value`, settings as `key=value`."""
        self.words = list(words)
        result = []
        while self.words:
            word = self.words.pop(0)
            if word == "--":
                return [*result, word, *self.words]
            if word.startswith("--") or re.fullmatch("-[a-z]", word):
                result += self._rewrite_flag(word)
            else:
                result += self._rewrite_key(word)
        return result

    def _rewrite_flag(self, word: str) -> list[str]:
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        found = self._exact(flag)
        if found is None and self._is_setting(key):
            if not equals:
                value = self._value_of_setting(key)
            return [f"{key}={value}"]
        if found is None:
            found = self._abbreviated(flag)
        if found is None:
            return [word]  # argparse says what is wrong
        if equals:
            return _with_value(found, value)
        return self._with_next_words(found)

    def _rewrite_key(self, word: str) -> list[str]:
        key, equals, value = word.partition("=")
        for each in self.options:
            if equals and dashed(key) == dashed(each.name):
                return _with_value(each, value)
        return [word]

    def _with_next_words(self, found: "Option") -> list[str]:
        """A flag with the words after it that are its values."""
        if found.kind is bool:
            if self.words and self.words[0].lower() in (*_TRUE, *_FALSE):
                return _with_value(found, self.words.pop(0))
            return [found.flag]
        if found.takes_list:
            result = [found.flag]
            while self.words and not self.words[0].startswith("-"):
                result.append(self.words.pop(0))
            return result
        if "bare" in found.metadata or not self.words:
            return [found.flag]
        return [found.flag, self.words.pop(0)]

    def _value_of_setting(self, key: str) -> str:
        """The word after `--key`; on for a switch that stands alone."""
        following = self.words[0] if self.words else ""
        is_switch = self.settings.get(key) is bool
        if is_switch and following.lower() not in (*_TRUE, *_FALSE):
            return "on"
        return self.words.pop(0) if self.words else ""

    def _exact(self, flag: str) -> "Option | None":
        for each in self.options:
            if each.has_flag(flag):
                return each
        return None

    def _abbreviated(self, flag: str) -> "Option | None":
        """The one option with a flag that begins so."""
        matching = []
        for each in self.options:
            if any(dashed(own).startswith(dashed(flag)) for own in each.flags):
                matching.append(each)
        if len(matching) == 1:
            return matching[0]
        return None

    def _is_setting(self, key: str) -> bool:
        section = key.split(".")[0]
        is_free = "." in key and get_origin(self.settings.get(section)) is dict
        return key in self.settings or is_free


def _with_value(found: "Option", value: str) -> list[str]:
    """An option with one value, or with those of a YAML list."""
    if found.kind is bool and value.lower() in _TRUE:
        return [found.flag]
    if found.kind is bool and value.lower() in _FALSE:
        return []
    if found.several and value.startswith("[") and value.endswith("]"):
        values = [str(each) for each in yaml.safe_load(value)]
        if found.takes_list:
            return [found.flag, *values]
        return [f"{found.flag}={each}" for each in values]
    return [_joined(found.flag, value)]


def _joined(flag: str, value: str) -> str:
    if flag.startswith("--"):
        return f"{flag}={value}"
    return f"{flag}{value}"  # -k10


def _setting_types(kind: type | None) -> dict[str, Any]:
    """The type of each setting by its dotted key."""
    if kind is None:
        return {}
    return {key: field.type for key, field in iterate_settings(kind)}


def dashed(word: str) -> str:
    return word.replace("_", "-")
