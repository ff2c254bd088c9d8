"""Booleans: on and off, bare and quoted, from everywhere that settings come from."""

import dataclasses

import pytest

from trainer.config.load import (
    load_config,
    load_recorded,
    load_settings,
    to_yaml,
)
from trainer.config.run import RunConfig
from trainer.config.setting import setting
from trainer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    tower: bool = setting(True, "whether there is one")
    name: str = setting("", "a text")


@dataclasses.dataclass(frozen=True)
class Outer:
    shuffle: bool = setting(True, "whether it is")
    inner: Inner = setting(Inner, "a section")


WORDS = {
    "on": True,
    "off": False,
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
}


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize(("word", "value"), WORDS.items())
def test_a_boolean_is_read_bare_and_quoted(tmp_path, word, value, quote):
    quoted = f"{quote}{word}{quote}"
    file = tmp_path / "config.yaml"
    file.write_text(
        f"shuffle: {quoted}\ninner:\n  tower: {quoted}\n  name: on\n"
    )
    of_file = load_settings(Outer, [file], ["inner.name=off"])
    assert of_file == Outer(value, Inner(value, "off"))
    of_words = load_settings(
        Outer, [], [f"shuffle={quoted}", f"inner.tower={quoted}"]
    )
    assert of_words == Outer(value, Inner(value))


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False)])
def test_a_boolean_of_a_record_is_read_bare_and_quoted(
    tmp_path, word, value, quote
):
    file = tmp_path / "config.yaml"
    quoted = f"{quote}{word}{quote}"
    file.write_text(
        f"log:\n  tensorboard: {quoted}\nstream:\n  shuffle: {quoted}\n"
    )
    config = load_recorded(file)
    assert (config.log.tensorboard, config.stream.shuffle) == (value, value)


@pytest.mark.parametrize("word", ["perhaps", "1.5", "[on]"])
def test_another_word_is_refused_with_its_key(word):
    with pytest.raises(InputError, match="shuffle"):
        load_settings(Outer, [], [f"shuffle={word}"])


@pytest.mark.parametrize(
    "key", ["stop_gradient", "tower", "mutual_information"]
)
@pytest.mark.parametrize("word", ["on", "off"])
def test_the_models_switches_are_read_from_everywhere(tmp_path, key, word):
    """Words or booleans: all ways of writing one are the same."""
    of_words = load_config([], [f"model.{key}={word}"])
    for number, text in enumerate((word, f"'{word}'", f'"{word}"')):
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"model:\n  {key}: {text}\n")
        assert load_config([file], []) == of_words
        assert load_recorded(file) == of_words


def test_what_is_written_is_read_as_it_was(tmp_path):
    file = tmp_path / "config.yaml"
    config = load_config(
        [], ["model.tower=off", "stream.shuffle=off", "log.tensorboard=on"]
    )
    file.write_text(to_yaml(config))
    assert load_recorded(file) == config
    assert isinstance(config, RunConfig)
