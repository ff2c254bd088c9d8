"""docs/settings.md is what the settings say."""

from pathlib import Path

import pytest

from trainer.config.changes import iterate_settings
from trainer.config.command_line.describe import describe_type, describe_value
from trainer.config.reference import settings_page

PAGE = Path(__file__).parents[4] / "docs" / "settings.md"


def test_the_page_is_generated_from_the_settings():
    hint = "python -m trainer.config.reference > docs/settings.md"
    assert PAGE.read_text(encoding="utf-8") == settings_page(), hint


def test_every_setting_of_a_run_is_on_the_page():
    text = settings_page()
    sections = {
        key.split(".")[0] for key, _ in iterate_settings() if "." in key
    }
    for key, _ in iterate_settings():
        if key not in sections:
            assert f"| `{key}` |" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "on/off"),
        (int | str, "int or text"),
        (str | None, "text"),
        (list[str], "list of text"),
        (tuple[int, ...], "list of int"),
        (dict[str, int], "section"),
    ],
)
def test_types_are_said_in_words(kind, words):
    assert describe_type(kind) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "on"),
        (None, "–"),
        ("", "–"),
        ([], "–"),
        ([1, 2], "[1, 2]"),
        (0.5, "0.5"),
    ],
)
def test_defaults_are_said_as_one_writes_them(value, text):
    assert describe_value(value) == text
