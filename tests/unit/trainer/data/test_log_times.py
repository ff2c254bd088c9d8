"""What a log's times are, and what another log's may be beside them."""

import pytest

from tests.unit.trainer.data.prepare.test_pipeline import run, write
from trainer.data.log_times import (
    DATES,
    NUMBERS,
    UNKNOWN,
    LogTimes,
    describe_mixed_units,
    guess_unit,
    refuse_other_times,
)
from trainer.errors import InputError


@pytest.mark.parametrize(
    ("time", "unit"),
    [
        (1.7e9, "s"),
        (1_700_000_000_000, "ms"),
        (1.7e15, "us"),
        (1.7e18, "ns"),
        (19_000, UNKNOWN),  # days, or places in a list
        (0, UNKNOWN),
        (-1.7e9, UNKNOWN),
        (float("nan"), UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_the_size_of_a_number_tells_its_unit(time, unit):
    assert guess_unit(time) == unit


def test_what_is_not_known_is_not_compared():
    seconds = LogTimes(NUMBERS, "s")
    for ours, theirs in (
        (seconds, seconds),
        (seconds, LogTimes(NUMBERS, UNKNOWN)),
        (LogTimes(UNKNOWN, "s"), seconds),
        (LogTimes(UNKNOWN, "us"), LogTimes(DATES, "us")),
        (LogTimes(DATES, "us"), LogTimes(DATES, "us")),
    ):
        refuse_other_times("data", ours, "log", theirs)
    for ours, theirs in (
        (seconds, LogTimes(NUMBERS, "ms")),
        (seconds, LogTimes(DATES, "us")),
        (LogTimes(DATES, "us"), LogTimes(NUMBERS, "us")),
        (LogTimes(UNKNOWN, "s"), LogTimes(DATES, "us")),
    ):
        with pytest.raises(InputError, match=r"data: its times are .* of log"):
            refuse_other_times("data", ours, "log", theirs)


@pytest.mark.parametrize(
    ("times", "options", "kind", "unit"),
    [
        ((1_700_000_000, 1_700_000_001), {}, NUMBERS, "s"),
        ((1, 2), {}, NUMBERS, UNKNOWN),
        ((1, 2), {"time_unit": "ms"}, NUMBERS, "ms"),
        (("2024-01-01", "2024-01-02"), {}, DATES, "us"),
    ],
)
def test_a_dataset_says_what_its_times_are(
    tmp_path, times, options, kind, unit
):
    rows = [("u", item, "a", time) for item in range(3) for time in times]
    log = write(tmp_path / "log.csv", rows)
    dataset = run(tmp_path / "out", log, **options)
    assert (dataset.time_kind, dataset.time_unit) == (kind, unit)


def test_domains_of_several_units_are_warned_of(tmp_path, capfd):
    """One domain's file has seconds and another's milliseconds; also within a domain."""
    seconds = [("u", item, "shop", 1_700_000_000 + item) for item in range(3)]
    rows = [(u, item, "video", time * 1000) for u, item, _, time in seconds]
    write(tmp_path / "logs/1.csv", seconds)
    write(tmp_path / "logs/2.parquet", rows)
    run(tmp_path / "out", tmp_path / "logs")
    warning = "warning: times look like seconds (shop) and milliseconds (video)"
    assert warning in capfd.readouterr().err
    run(tmp_path / "fine", tmp_path / "logs/1.csv")
    assert "look like" not in capfd.readouterr().err
    text = describe_mixed_units([("a", 1.7e9, 1.7e12), ("b", 5.0, 1.7e9)])
    assert text.startswith("times look like seconds (a) and milliseconds (a)")


def test_a_unit_that_the_times_do_not_look_like_is_warned_of(tmp_path, capfd):
    rows = [("u", item, "a", 1_700_000_000_000 + item) for item in range(3)]
    log = write(tmp_path / "log.csv", rows)
    dataset = run(tmp_path / "out", log, time_unit="s")
    assert "--time-unit s: the newest time" in capfd.readouterr().err
    assert dataset.time_unit == "ms"
