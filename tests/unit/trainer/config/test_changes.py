"""What may change on resume and on a warm start is what it was when two lists of names said it."""

import pytest

from trainer.config.changes import (
    is_allowed,
    iterate_settings,
    may_change_on_resume,
    may_change_on_warm_start,
    may_differ_by_host,
    refused_changes,
)
from trainer.config.load import flatten_config
from trainer.config.run import RunConfig
from trainer.config.setting import help_of, setting

MODEL = {
    "model.time_knots",
    "model.dropout",
    "model.loss",
    "model.eta",
    "model.learn_scales",
    "model.correction_temperature",
    "model.prediction_temperature",
    "model.harm_temperature",
    "model.mutual_information_temperature",
    "model.mutual_information_negatives",
    "model.mutual_information_denominator",
    "model.mutual_information_pooling",
    "model.mutual_information_similarity",
    "model.precision",
    "model.kernel",
    "model.init_std",
}
ON_RESUME = {
    "data",
    "run",
    "timeout_minutes",
    "deterministic",
    "accumulation",
    "epochs",
    "max_steps",
    "log",
    "profile",
    "checkpoint",
    "table.placement",
    "table.cache_share",
    "table.device_share",
    "table.group_size",
    "stream.workers",
    "stream.prefetch",
    "stream.verify",
    "stream.damaged",
    "stream.cache",
    "stream.cache_bytes",
    "stream.attempts",
    "stream.retry_seconds",
    "stream.timeout_seconds",
    "stream.read_ahead",
    "evaluation.batch_size",
    "evaluation.every_epochs",
    "evaluation.min_users",
    "evaluation.patience",
    "evaluation.recency_term",
    "optimizer.zero_stage",
    "deepspeed.zero_optimization",
}
ON_WARM_START = {
    *ON_RESUME,
    "seed",
    "global_batch_size",
    "tokens_per_batch",
    "warm_start",
    "warm_kept",
    "optimizer",
    "table.learning_rate",
    "table.init_std",
    "table.communication",
    "negatives",
    "split",
    "stream",
    "evaluation",
    "deepspeed",
}


def test_what_may_change_on_resume():
    assert may_change_on_resume() == ON_RESUME
    assert may_change_on_resume(constant_schedule=False) == ON_RESUME - {
        "epochs",
        "max_steps",
    }


def test_what_may_change_on_a_warm_start():
    expected = ON_WARM_START | MODEL
    assert may_change_on_warm_start() == expected


def test_what_may_differ_between_hosts():
    fetching = {key for key in ON_RESUME if key.startswith("stream.")}
    fetching -= {
        "stream.workers",
        "stream.prefetch",
        "stream.verify",
        "stream.damaged",
    }
    assert may_differ_by_host() == {"data", "run", "warm_start", *fetching}


def test_every_setting_has_a_line_of_help():
    missing = []
    for key, field in iterate_settings():
        if not help_of(field):
            missing.append(key)
    assert missing == []


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("log.every", True),
        ("log", True),
        ("logs", False),
        ("deepspeed.zero_optimization.stage", True),
        ("deepspeed.zero_optimization2.stage", False),
        ("deepspeed.bf16", False),
        ("model.dim", False),
    ],
)
def test_a_section_stands_for_all_keys_below_it(key, allowed):
    assert is_allowed(key, may_change_on_resume()) == allowed


def test_refused_changes_are_named_in_order():
    before = flatten_config(RunConfig())
    now = {**before, "seed": 1, "epochs": 3, "model.dim": 64, "log.new": 2}
    assert refused_changes(before, now, may_change_on_resume()) == [
        "model.dim",
        "seed",
    ]
    assert refused_changes(before, now, may_change_on_warm_start()) == [
        "model.dim"
    ]
    assert refused_changes(now, now, ()) == []


@pytest.mark.parametrize(
    ("word", "now", "same"),
    [
        ("on", True, True),
        ("off", False, True),
        ("on", False, False),
        ("off", True, False),
        ("on", "on", True),
        ("maybe", True, False),
    ],
)
def test_a_recorded_word_is_the_boolean_that_it_has_become(word, now, same):
    refused = refused_changes({"model.tower": word}, {"model.tower": now}, ())
    assert (refused == []) == same


@pytest.mark.parametrize("text", ["", "two\nlines"])
def test_help_is_one_line(text):
    with pytest.raises(ValueError, match="one line"):
        setting(1, text)
