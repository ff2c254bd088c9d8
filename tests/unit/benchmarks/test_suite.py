"""Settings come from YAML and command line, records go where they should, tables stand where they belong."""

import json

import pytest

from benchmarks import stream, suite, tables, train_step


def test_short_is_laid_over_full_and_the_command_line_over_both():
    settings, options = suite.settings(
        "stream", stream.Settings, ["--short", "samples=7"]
    )
    assert (settings.repeats, settings.samples, settings.batch_size) == (
        2,
        7,
        1024,
    )
    assert options == suite.Options(True, None, ("samples=7",))
    settings, options = suite.settings("stream", stream.Settings, ["data=x"])
    assert (settings.repeats, settings.samples) == (5, 50_000)
    assert options.json == suite.RESULTS / "stream.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["speed=9"], "Key 'speed' not in 'Settings'"),
        (["steps=many"], "steps: Value 'many'"),
        (["items=[]"], "items is []: give at least 10"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("train_step", train_step.Settings, arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.ranks
def test_no_folder_of_this_machine_is_recorded(tmp_path):
    given = [f"data={tmp_path / 'shop'}", f"folder={tmp_path}"]
    settings, options = suite.settings("stream", stream.Settings, given)
    header = suite.header("stream", settings, options)
    assert str(tmp_path) not in json.dumps(header)
    assert (
        header["command"]
        == f"python benchmarks/stream.py data=shop folder={tmp_path.name}"
    )
    assert (
        header["settings"]["data"] == "shop"
        and header["form"] == "full"
        and header["machine"]["cores"] >= 1
    )


def test_tables_are_aligned_and_keep_their_order():
    text = suite.markdown(
        [{"what": "a", "s": 1}, {"what": "longer", "more": "x"}]
    )
    assert text.splitlines() == [
        "| what   | s | more |",
        "|--------|--:|-----:|",
        "| a      | 1 |      |",
        "| longer |   |    x |",
    ]
    assert suite.markdown([]) == ""


def test_a_record_without_a_place_is_named(tmp_path):
    (tmp_path / "stream.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"<!-- stream --> .* stream\.json"):
        tables.rewritten("<!-- stream --> and no end", tmp_path)


def test_the_tables_in_the_text_are_those_of_the_records():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run python benchmarks/tables.py"
