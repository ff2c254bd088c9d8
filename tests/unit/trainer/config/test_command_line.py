"""Options and settings, as flags and as key=value."""

import dataclasses
import sys
from typing import Literal

import pytest

from trainer.config.command_line import option, parse_options
from trainer.config.command_line.help import describe_settings
from trainer.config.load import load_settings
from trainer.config.run import RunConfig
from trainer.config.setting import setting


@dataclasses.dataclass(frozen=True)
class Rules:
    least_users: int = setting(100, "users that judge a domain")
    share: float = setting(0.5, "100 % is all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    run: str = option("the run", flags=("--run", "--of"), metavar="DIR")
    input: tuple[str, ...] = option("logs", ())
    base: list[str] = option("a YAML", list, repeat=True)
    split: Literal["test", "validation"] = option("which items", "test")
    k: int = option("how many", 10, flags=("-k",))
    fresh: bool = option("begin anew", False)
    rollback: str | None = option("go back", None, bare="")
    days: float | None = option("a window", None)
    rules: Rules = option("rules", Rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    config: list[str] = option("a YAML", list, repeat=True)
    fresh: bool = option("begin anew", False)
    settings: list[str] = option("settings", list, settings_of=RunConfig)


def parsed(*words):
    return parse_options(Options, "About.", list(words))


SAME = {
    "a needed one": [
        ["--run", "r"],
        ["--run=r"],
        ["--of", "r"],
        ["run=r"],
        ["--ru", "r"],
    ],
    "a choice": [
        ["--split", "validation"],
        ["--split=validation"],
        ["split=validation"],
    ],
    "a number": [["-k", "3"], ["-k3"], ["--k", "3"], ["k=3"], ["--k=3"]],
    "a switch": [
        ["--fresh"],
        ["fresh=on"],
        ["--fresh=true"],
        ["--fresh", "yes"],
        ["--fr"],
    ],
    "a switch that is off": [
        [],
        ["fresh=off"],
        ["--fresh=false"],
        ["--fresh", "no"],
    ],
    "a list": [["--input", "a", "b"], ["input=[a,b]"], ["--input=[a, b]"]],
    "a repeated one": [
        ["--base", "a", "--base", "b"],
        ["base=a", "--base=b"],
        ["base=[a,b]"],
    ],
    "a bare one": [["--rollback"], ["rollback="], ["--rollback="]],
    "a bare one with a value": [["--rollback", "3"], ["rollback=3"]],
    "one of a dataclass in it": [
        ["--least-users", "7"],
        ["--least_users", "7"],
        ["least_users=7"],
        ["least-users=7"],
    ],
    "none or a number": [["--days", "1.5"], ["days=1.5"]],
    "what the launcher appends": [
        [],
        ["--local_rank=1"],
        ["--local_rank", "1"],
    ],
}


@pytest.mark.parametrize("ways", SAME.values(), ids=SAME)
def test_flags_and_keys_are_the_same(ways):
    needed = [] if ways[0] == ["--run", "r"] else ["--run", "r"]
    results = [parsed(*needed, *way) for way in ways]
    assert all(result == results[0] for result in results)


def test_values_have_their_types():
    options = parsed("run=r", "k=3", "days=2", "least_users=5", "input=x")
    assert options == Options(
        run="r", k=3, days=2.0, rules=Rules(least_users=5), input=("x",)
    )
    assert isinstance(options.days, float)


def test_the_words_after_a_list_are_its_own_up_to_the_next_flag():
    options = parsed("--input", "domain=books/", "k=3", "--run", "r")
    assert options.input == ("domain=books/", "k=3") and options.k == 10


def test_the_value_of_a_flag_is_taken_as_it_stands():
    assert parsed("--run", "k=3").run == "k=3"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--run"),
        (["run=r", "k=x"], "-k"),
        (["run=r", "split=all"], "--split"),
        (["run=r", "kk=3"], "kk=3"),
        (["run=r", "--nothing"], "--nothing"),
        (["run=r", "fresh=maybe"], "--fresh"),
    ],
)
def test_what_cannot_be_used_ends_with_status_2_and_its_name(
    words, said, capsys
):
    with pytest.raises(SystemExit) as left:
        parsed(*words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def trained(*words):
    options = parse_options(Training, None, list(words))
    return options, load_settings(RunConfig, [], options.settings)


@pytest.mark.parametrize(
    "words",
    [
        ["model.dim=64", "epochs=3", "stream.shuffle=off"],
        ["--model.dim", "64", "--epochs=3", "--stream.shuffle", "off"],
        ["--model.dim=64", "epochs=3", "--stream.shuffle=no"],
    ],
)
def test_settings_are_flags_and_keys(words):
    options, config = trained("--config", "a.yaml", *words, "--fresh")
    assert options.fresh and options.config == ["a.yaml"]
    assert (config.model.dim, config.epochs, config.stream.shuffle) == (
        64,
        3,
        False,
    )


def test_later_settings_win_whatever_their_form():
    assert trained("--epochs", "3", "epochs=4")[1].epochs == 4
    assert trained("epochs=4", "--epochs", "3")[1].epochs == 3


def test_a_switch_alone_is_on():
    _, config = trained(
        "stream.balance=off", "--deterministic", "--stream.balance"
    )
    assert config.deterministic and config.stream.balance


def test_free_sections_have_flags_too():
    _, config = trained("--deepspeed.zero_optimization.stage", "2")
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_options_between_settings_are_found():
    options, config = trained("epochs=3", "fresh=on", "seed=4", "config=[a, b]")
    assert options.fresh and options.config == ["a", "b"]
    assert (config.epochs, config.seed) == (3, 4)


def test_help_says_types_defaults_and_a_line_for_each(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        parsed("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "About.",
        "--run DIR, --of DIR",
        "(needed)",
        "--split {test,validation}",
        "(default: 10)",
        "100 % is all (default: 0.5)",
        "--rollback [TEXT]",
        "--fresh",
    ):
        assert words in text
    assert "local_rank" not in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_help_lists_every_setting(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = describe_settings(RunConfig)
    assert (
        "  epochs=INT " in text
        and "passes over the training users (default: 20)" in text
    )
    assert "optimizer.schedule={constant,linear,cosine}" in text
    assert "stream.shuffle={on,off}" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_version(capsys):
    with pytest.raises(SystemExit) as left:
        parsed("--version")
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("syncrec-trainer")


def test_the_words_of_the_process_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "run=r"])
    assert parse_options(Options, None).run == "r"
