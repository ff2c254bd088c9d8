"""The model's settings: what each says of itself, and which values are refused."""

from dataclasses import fields

import pytest

from syncrec.config import ModelConfig
from tests.unit.trainer.config.test_changes import MODEL, ON_RESUME

SWITCHES = ("tower", "learn_scales", "mutual_information")


@pytest.mark.parametrize(
    "setting", fields(ModelConfig), ids=lambda field: field.name
)
def test_a_setting_says_what_it_is_and_whether_it_may_change(setting):
    assert setting.metadata.keys() == {"help", "on_resume", "on_warm_start"}
    assert (
        setting.metadata["help"].strip()
        and "\n" not in setting.metadata["help"]
    )
    key = f"model.{setting.name}"
    assert setting.metadata["on_resume"] is (key in ON_RESUME)
    assert setting.metadata["on_warm_start"] is (key in MODEL)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["on", "off", 1])
def test_a_switch_is_a_boolean(name, value):
    with pytest.raises(
        ValueError, match=f"model.{name} is {value}: give true or"
    ):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    "value, meaning",
    [
        (True, True),
        (False, False),
        ("on", True),
        ("off", False),
        ("harm", "harm"),
    ],
)
def test_the_gradient_is_stopped_everywhere_nowhere_or_where_harm_is(
    value, meaning
):
    assert ModelConfig(stop_gradient=value).stop_gradient is meaning


@pytest.mark.parametrize("value", ["sometimes", 1, None])
def test_another_stop_gradient_is_refused(value):
    with pytest.raises(
        ValueError,
        match=f"model.stop_gradient is {value}: give on, off or harm",
    ):
        ModelConfig(stop_gradient=value)
