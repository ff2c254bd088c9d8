"""What is printed has no secrets and no control characters."""

import pytest

from trainer.files.redact import (
    find_local_folder,
    hide_secrets,
    is_address,
    printable_text,
    redact_for_record,
    redact_location,
)


@pytest.mark.parametrize(
    ("location", "printed"),
    [
        ("/data/shop?x", "/data/shop?x"),
        ("https://host/a?key=1#b", "https://host/a?…"),
        ("s3://user:pa55@bucket/a", "s3://…@bucket/a"),
        ("pipe:cat secret", "pipe:cat secret"),
    ],
)
def test_addresses_lose_their_secrets(location, printed):
    assert redact_location(location) == printed


def test_texts_lose_secrets_of_addresses_and_of_the_environment():
    environment = {"WANDB_API_KEY": "abcdef123", "HOME": "/home/x"}
    text = "401 for https://u:pw@host/a?sig=1 and s3://b, key abcdef123 /home/x"
    assert hide_secrets(text, environment) == (
        "401 for https://…@host/a?… and s3://b, key … /home/x"
    )
    assert hide_secrets("url: /a?key=1/api", {}) == "url: /a?…"
    # A short value would hide parts of other words.
    assert hide_secrets("a token", {"TOKEN": "a"}) == "a token"


def test_a_command_is_not_recorded():
    assert redact_for_record("pipe:cat secret") == "pipe:…"
    assert redact_for_record("https://u@host/a") == "https://…@host/a"


def test_folders_and_addresses():
    assert (
        find_local_folder("file:/a%20b") == "/a b"
        and find_local_folder("a/b") == "a/b"
    )
    assert find_local_folder("s3://a") is None and is_address("pipe:x")
    assert not is_address("data/shop")


def test_words_are_one_short_line():
    assert printable_text("a\x1b[31m\n b") == "a [31m b"
    assert printable_text(ValueError()) == "ValueError"
    assert len(printable_text("x" * 1000)) == 300
