"""What example.py, which goes with an exported model, takes for a time."""

import pytest

from trainer.serving.example import check_time, read_event

SECONDS = {
    "time_kind": "numbers",
    "time_unit": "s",
    "first_time": 1.6e9,
    "last_time": 1.7e9,
}
DATES = {
    "time_kind": "dates",
    "time_unit": "us",
    "first_time": 1.6e15,
    "last_time": 1.7e15,
}
NUMBERS = {
    "time_kind": "numbers",
    "time_unit": "unknown",
    "first_time": 1.0,
    "last_time": 9.0,
}
OLD = {"first_time": 1.0, "last_time": 9.0}  # an export of before says nothing


@pytest.mark.parametrize(
    ("text", "schema", "event"),
    [
        ("1764146000:books:B:1", SECONDS, (1_764_146_000.0, "books", "B:1")),
        ("7:books:b", NUMBERS, (7.0, "books", "b")),
        ("1764146000:books:b", OLD, (1_764_146_000.0, "books", "b")),
        ("1970-01-02:a b:c", SECONDS, (86400.0, "a b", "c")),
        ("1970-01-01T00:00:01.5Z:a:b", DATES, (1.5e6, "a", "b")),
        ("1970-01-01 01:00+01:00:a:b", DATES, (0.0, "a", "b")),
        ("12:a:", SECONDS, (12.0, "a", "")),
    ],
)
def test_times_are_numbers_or_dates(text, schema, event):
    assert read_event(text, schema) == event


@pytest.mark.parametrize(
    ("text", "schema", "named"),
    [
        ("1764146000:a:b", DATES, "1764146000 looks like a time in s, the model's are in us"),
        ("1764146000000:a:b", SECONDS, "looks like a time in ms"),
        ("2026-01-31:a:b", NUMBERS, "is a date: the model's times are numbers"),
        ("2026-01-31:a:b", OLD, "is a date: the model's times are numbers"),
        ("2026-13-31:a:b", SECONDS, "month must be in"),
        ("yesterday:a:b", SECONDS, "is no time: give a date"),
        ("books:b", SECONDS, "'books:b' is not TIME:DOMAIN:ITEM"),
    ],
)  # fmt: skip
def test_what_is_no_time_of_the_model_is_refused(text, schema, named):
    with pytest.raises(ValueError, match=named):
        read_event(text, schema)


def test_a_service_is_told_of_another_unit_too():
    check_time(1.7e9, SECONDS)
    with pytest.raises(ValueError, match="looks like a time in ns"):
        check_time(1.7e18, SECONDS)
