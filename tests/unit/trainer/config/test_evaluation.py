"""The settings of a split: shares, days and dates."""

import pytest

from trainer.config.changes import (
    may_change_on_resume,
    may_change_on_warm_start,
    refused_changes,
)
from trainer.config.evaluation import Days, Moment, Share, parse_window
from trainer.config.load import flatten_config, load_config
from trainer.config.run import RunConfig
from trainer.errors import InputError


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("0.1", Share(0.1)),
        ("1e-3", Share(0.001)),
        ("7d", Days(7)),
        ("0.5 d", Days(0.5)),
        ("2014-07-01", Moment(1404172800)),
        ("2014-07-01T12:00", Moment(1404216000)),
        ("2014-07-01T12:00+02:00", Moment(1404208800)),
    ],
)
def test_a_window_is_a_share_days_or_a_date(text, window):
    assert parse_window("split.test", text) == window
    assert load_config([], [f"split.test={text}"]).split.test == text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("split.test=0", "split.test is 0: a share"),
        ("split.test=1", "split.test is 1: a share"),
        ("split.test=-0.1", "split.test is -0.1: a share"),
        ("split.test=nan", "split.test is nan: a share"),
        ("split.validation=0d", "split.validation is 0d: give more than 0"),
        ("split.validation=soon", "a date"),
        ("split.validation=", "a date"),
        ("split.validation=2014-13-01", "a date"),
        ("split.kind=time", "time"),
        ("split.whose=nobody", "nobody"),
    ],
)
def test_what_is_no_window_is_refused_in_one_line(setting, message):
    with pytest.raises(InputError) as refusal:
        load_config([], [setting])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_numbers_of_yaml_are_shares(tmp_path):
    file = tmp_path / "split.yaml"
    file.write_text(
        "split: {kind: timeline, validation: 0.2, test: 2014-07-01}\n"
    )
    split = load_config([file], []).split
    assert (split.kind, split.validation) == ("timeline", "0.2")
    assert parse_window("split.test", split.test) == Moment(1404172800)


def test_a_split_changes_on_a_warm_start_and_not_on_resume():
    now = flatten_config(load_config([], ["split.kind=timeline"]))
    before = flatten_config(RunConfig())
    on_resume = refused_changes(before, now, may_change_on_resume())
    assert on_resume == ["split.kind"]
    on_warm_start = refused_changes(before, now, may_change_on_warm_start())
    assert on_warm_start == []


def test_runs_of_before_were_split_by_leave_one_out():
    before = {}
    for key, value in flatten_config(RunConfig()).items():
        if not key.startswith("split."):
            before[key] = value
    same = flatten_config(RunConfig())
    assert refused_changes(before, same, may_change_on_resume()) == []
    other = flatten_config(load_config([], ["split.kind=timeline"]))
    assert refused_changes(before, other, may_change_on_resume()) == [
        "split.kind"
    ]
