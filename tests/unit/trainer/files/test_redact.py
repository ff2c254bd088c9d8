"""What is printed has no secrets and no control characters."""

import pytest

from trainer.files.redact import folder_of, is_address, recorded, shown, words


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
    assert shown(location) == printed


def test_a_command_is_not_recorded():
    assert recorded("pipe:cat secret") == "pipe:…"
    assert recorded("https://u@host/a") == "https://…@host/a"


def test_folders_and_addresses():
    assert folder_of("file:/a%20b") == "/a b" and folder_of("a/b") == "a/b"
    assert folder_of("s3://a") is None and is_address("pipe:x")
    assert not is_address("data/shop")


def test_words_are_one_short_line():
    assert words("a\x1b[31m\n b") == "a [31m b"
    assert words(ValueError()) == "ValueError"
    assert len(words("x" * 1000)) == 300
