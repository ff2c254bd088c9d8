"""Every setting of a run with odd values: one line that names it, or a model that can be built."""

import dataclasses
import functools
from typing import Literal, get_args, get_origin

import pytest
import torch

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from tests.helpers.alone import group_of_one
from trainer.config.changes import iterate_settings
from trainer.config.load import load_config, load_settings
from trainer.config.run import RunConfig
from trainer.errors import InputError

SECTIONS = {
    field.name: field.type
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(field.type)
}
KEYS = [
    key
    for key, field in iterate_settings()
    if not dataclasses.is_dataclass(field.type) and key != "deepspeed"
]
LONG = "[" + "1," * 500 + "1]"
WORDS = [
    "0", "-1", "1", "63", "0.5", str(2**40), str(10**20), "1e-300", "1e300", "nan", "inf", "-inf",
    "", "''", "x", "null", LONG, "{a: 1}", "9" * 5000,
]  # fmt: skip
TINY = {
    "model": {
        "dim": 8,
        "max_length": 8,
        "ffn_dim": 8,
        "experts": 2,
        "cross_experts": 1,
        "blocks": 1,
        "time_knots": 2,
    },
}
# Above these a model takes more than a moment; the settings allow more.
BUILT_AT_MOST = 1000


def message_of(refused):
    message = str(refused.value)
    assert message.isprintable() and len(message) < 2000, message[:300]
    return message


@functools.cache
def loaded(key, word):
    """The run's configuration with a setting, or the line that refuses it.

    A section is read by itself: reading a whole run takes a hundred times as long.
    """
    section, _, name = key.rpartition(".")
    kind = SECTIONS.get(section, RunConfig)
    try:
        values = load_settings(kind, [], [f"{name}={word}"])
        if not section:
            return values
        tiny = dict(TINY.get(section, {}))
        tiny.pop(name, None)
        values = dataclasses.replace(values, **tiny)
        return dataclasses.replace(RunConfig(), **{section: values})
    except (InputError, ValueError) as error:
        return str(error)


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def is_number(key):
    field = dict(iterate_settings())[key]
    return field.type in (int, float)


def assert_refused(key, line):
    """One line that names the setting, and that a terminal shows."""
    assert line.isprintable() and len(line) < 2000, line[:300]
    assert key.rpartition(".")[2] in line


@pytest.mark.parametrize("key", KEYS)
def test_an_odd_value_is_refused_by_its_name_or_taken(key):
    for word in WORDS:
        config = loaded(key, word)
        if isinstance(config, str):
            assert_refused(key, config)
            continue
        value = value_of(config, key)
        if is_number(key):
            assert value == 0 or 1e-30 <= value < 2**63 or value == -1
        assert not isinstance(value, (list, dict))


@pytest.mark.parametrize("key", [key for key in KEYS if is_number(key)])
def test_no_number_of_a_run_is_without_an_end(key):
    for word in (str(10**20), "1e300", "nan", "inf"):
        assert_refused(key, loaded(key, word))


def accepted(section, at_most):
    """(key, word, configuration) of every odd value of a section that is taken."""
    found = []
    for key in KEYS:
        if not key.startswith(f"{section}."):
            continue
        field = dict(iterate_settings())[key]
        words = WORDS
        if get_origin(field.type) is Literal:
            words = get_args(field.type)
        for word in words:
            config = loaded(key, word)
            if isinstance(config, str):
                continue
            value = value_of(config, key)
            if not isinstance(value, (int, float)) or value <= at_most:
                found.append((key, word, config))
    return found


def test_what_is_taken_of_the_model_builds():
    cases = accepted("model", BUILT_AT_MOST)
    assert len(cases) > 80
    for key, word, config in cases:
        model = SyNCRec(config.model, 2)
        finite = [weight.isfinite().all() for weight in model.parameters()]
        assert all(finite), (key, word)


def test_what_is_taken_of_the_table_builds_or_says_what_the_device_lacks():
    refused = []
    with group_of_one():
        for key, word, config in accepted("table", BUILT_AT_MOST):
            try:
                ItemTable(10, 8, config.table, config.seed, torch.device("cpu"))
            except ValueError as error:
                refused.append(f"{key}={word}")
                assert_refused(key, str(error))
    assert refused == [
        "table.optimizer=adam",
        "table.optimizer=partial_rowwise_adam",
        "table.placement=cached",
        "table.group_size=63",
    ]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.dim=63", "model.dim is 63: give a multiple of 4"),
        ("seed=100000000000000000000", "seed is 100000000000000000000"),
        ("seed=9223372036854775808", "give at most 9223372036854775807"),
        ("global_batch_size=99999999999", "give at most 2147483647"),
        ("timeout_minutes=1e-9", "give at least 0.001"),
        ("deepspeed=[1,2]", "deepspeed"),
        ("model=[1,2]", "model"),
        ("model.dim=" + "9" * 5000, "model.dim"),
        ("epochs=" + "x" * 5000, "epochs"),
    ],
)
def test_a_whole_run_refuses_in_a_line(override, named):
    with pytest.raises(InputError) as refused:
        load_config([], [override])
    assert named in message_of(refused)
