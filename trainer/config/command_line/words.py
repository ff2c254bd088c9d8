"""The words of a command line, brought into the one form that argparse reads.

fresh=on            --fresh                     the key of a switch
--fresh off                                     a switch that is off is left out
keep=3              --keep=3                    the key of an option
--least_users 5     --least-users 5             - and _ are the same
input=[a,b]         --input a b                 a list as YAML has it
--model.dim 64      model.dim=64                the key of a setting
"""

import re
from collections.abc import Sequence
from typing import Any, get_origin

import yaml

from trainer.config.changes import iterate_settings
from trainer.config.command_line.option import Option, with_dashes

_TRUE = ("on", "true", "yes")
_FALSE = ("off", "false", "no")
_SHORT_FLAG = re.compile("-[a-z]")


class WordRewriter:
    """Rewrites options as `--flag=value`, and settings as `key=value`."""

    def __init__(self, options: Sequence[Option], settings_kind: type | None):
        """settings_kind: the configuration whose settings are words too; None: none are."""
        self.options = options
        self.settings = _types_of_settings(settings_kind)
        self.words: list[str] = []  # those that are left

    def rewrite(self, words: list[str]) -> list[str]:
        """The words in argparse's form, in their order."""
        self.words = list(words)
        result: list[str] = []
        while self.words:
            word = self.words.pop(0)
            if word == "--":
                return [*result, word, *self.words]
            if word.startswith("--") or _SHORT_FLAG.fullmatch(word):
                result += self._rewrite_flag(word)
            else:
                result += self._rewrite_key(word)
        return result

    def _rewrite_flag(self, word: str) -> list[str]:
        """A word that begins with dashes, and the words after it that are its value."""
        flag, equals, value = word.partition("=")
        option = self._option_with(flag)
        if option is None:
            key = flag.removeprefix("--")
            key = key.replace("-", "_")
            if self._is_setting(key):
                if not equals:
                    value = self._take_value_of_setting(key)
                return [f"{key}={value}"]
            option = self._abbreviated_option(flag)
        if option is None:
            return [word]  # argparse says what is wrong
        if equals:
            return _with_value(option, value)
        return self._with_next_words(option)

    def _rewrite_key(self, word: str) -> list[str]:
        """A word without dashes: the key and value of an option, of a setting, or neither."""
        key, equals, value = word.partition("=")
        if not equals:
            return [word]
        key = with_dashes(key)
        for option in self.options:
            if with_dashes(option.name) == key:
                return _with_value(option, value)
        return [word]

    def _with_next_words(self, option: Option) -> list[str]:
        """A flag with the words after it that are its values."""
        if option.is_switch:
            if _is_boolean(self._next_word()):
                value = self.words.pop(0)
                return _with_value(option, value)
            return [option.flag]
        if option.takes_list:
            result = [option.flag]
            while self.words and not self._next_word().startswith("-"):
                word = self.words.pop(0)
                result.append(word)
            return result
        if "bare" in option.metadata or not self.words:
            return [option.flag]
        value = self.words.pop(0)
        return [option.flag, value]

    def _take_value_of_setting(self, key: str) -> str:
        """The word after `--key`; on for a switch that stands alone."""
        is_switch = self.settings.get(key) is bool
        if is_switch and not _is_boolean(self._next_word()):
            return "on"
        if not self.words:
            return ""
        return self.words.pop(0)

    def _next_word(self) -> str:
        if not self.words:
            return ""
        return self.words[0]

    def _option_with(self, flag: str) -> Option | None:
        for option in self.options:
            if option.has_flag(flag):
                return option
        return None

    def _abbreviated_option(self, start: str) -> Option | None:
        """The one option with a flag that begins so."""
        matching = []
        for option in self.options:
            if option.has_flag_from(start):
                matching.append(option)
        if len(matching) != 1:
            return None
        return matching[0]

    def _is_setting(self, key: str) -> bool:
        """Whether a dotted key is a setting, or lies in a section of free keys."""
        if key in self.settings:
            return True
        section, dot, _ = key.partition(".")
        kind = self.settings.get(section)
        return bool(dot) and get_origin(kind) is dict


def _with_value(option: Option, value: str) -> list[str]:
    """An option with one value, or with those of a YAML list."""
    if option.is_switch and _is_boolean(value):
        if value.lower() in _TRUE:
            return [option.flag]
        return []
    is_list = value.startswith("[") and value.endswith("]")
    if option.several and is_list:
        values = []
        for element in yaml.safe_load(value):
            values.append(str(element))
        if option.takes_list:
            return [option.flag, *values]
        return [_join(option.flag, element) for element in values]
    return [_join(option.flag, value)]


def _join(flag: str, value: str) -> str:
    if flag.startswith("--"):
        return f"{flag}={value}"
    return f"{flag}{value}"  # -k10


def _is_boolean(word: str) -> bool:
    lower = word.lower()
    return lower in _TRUE or lower in _FALSE


def _types_of_settings(kind: type | None) -> dict[str, Any]:
    """The type of each setting by its dotted key."""
    kinds = {}
    if kind is not None:
        for key, field in iterate_settings(kind):
            kinds[key] = field.type
    return kinds
