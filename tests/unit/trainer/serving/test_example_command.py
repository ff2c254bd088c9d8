"""The program beside an export: its command line, its times, and what it refuses."""

import json
import warnings

import pytest

from tests.helpers.runs import finished_run, rank_of_one
from trainer.config.serving import ExportConfig
from trainer.serving import example
from trainer.serving.example import guess_unit, read_event, read_time
from trainer.serving.export import export_run

SECONDS = {"first_time": 1.7e9, "last_time": 1.764146e9}
MICROSECONDS = {"first_time": 1.7e15, "last_time": 1.764146e15}
NUMBERS = {"first_time": 1, "last_time": 500}
SAID = NUMBERS | {
    "time_unit": "ms"
}  # by --time-unit; their size does not say it
DOMAINS = ["books", "a:b", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rank_of_one() as ranks:
        own = ["model.prediction=cross", "model.time_knots=0"]
        run = finished_run(tmp_path_factory.mktemp("run"), ranks, *own)
        output = tmp_path_factory.mktemp("exported") / "model"
        export_run(run.folder, output, ranks, ExportConfig())
    return output


@pytest.fixture
def called(folder, monkeypatch, capsys):
    """Calls the program; (status, stdout, stderr)."""
    monkeypatch.setattr(example, "__file__", str(folder / "example.py"))

    def call(*arguments):
        status = 0
        try:
            example.main(list(arguments))
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2025-11-26T08:33:20Z", 1_764_146_000),
        ("2025-11-26T08:33:20", 1_764_146_000),
        ("2025-11-26 08:33:20", 1_764_146_000),
        ("2025-11-26T09:33:20+01:00", 1_764_146_000),
        ("2025-11-26T08:33:20.5Z", 1_764_146_000.5),
        ("2025-11-26T08:33", 1_764_145_980),
        ("2025-11-26", 1_764_115_200),
    ],
)
def test_a_date_is_in_the_models_unit(text, seconds):
    assert read_time(text, SECONDS) == seconds
    assert read_time(text, MICROSECONDS) == seconds * 1e6
    event = (seconds * 1e6, "books", "x:y")
    assert read_event(f"{text}:books:x:y", MICROSECONDS, DOMAINS) == event
    with pytest.raises(ValueError, match="no known unit, from 1 to 500"):
        read_time(text, NUMBERS)


@pytest.mark.parametrize(
    ("text", "span", "message"),
    [
        ("1764146000", MICROSECONDS, "looks like a time in s, the model"),
        ("1764146000000", SECONDS, "looks like a time in ms, the model"),
        ("nan", SECONDS, "is no time"),
        ("inf", NUMBERS, "is no time"),
        ("yesterday", SECONDS, "is no time"),
        ("2025-13-01", SECONDS, "is no date"),
        ("", SECONDS, "is no time"),
    ],
)
def test_a_time_of_another_unit_is_refused_with_the_models_span(
    text, span, message
):
    with pytest.raises(ValueError, match=message) as refused:
        read_time(text, span)
    assert str(refused.value).isprintable()


def test_numbers_are_taken_as_they_are():
    assert read_time("1764146000.5", SECONDS) == 1_764_146_000.5
    assert read_time("17", SECONDS) == 17
    assert read_time("1e2", NUMBERS) == 100
    assert read_time("2e9", NUMBERS) == 2e9
    assert [guess_unit(10.0**power) for power in (2, 9, 12, 15, 18, 21)] == [
        "unknown",
        "s",
        "ms",
        "us",
        "ns",
        "unknown",
    ]
    assert read_time("1970-01-01T00:00:01", SAID) == 1000


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("17:books:B0", (17, "books", "B0")),
        ("17:a:b:c", (17, "a:b", "c")),
        ("17:unknown:c:d", (17, "unknown", "c:d")),
        ("17:books:", (17, "books", "")),
    ],
)
def test_an_event_has_colons_in_any_part(text, event):
    assert read_event(text, NUMBERS, DOMAINS) == event


@pytest.mark.parametrize("text", ["books:B0", "", "17", "x:books:B0"])
def test_what_is_no_event_is_told_the_form(text):
    with pytest.raises(ValueError, match=r"TIME:DOMAIN:ITEM|is no time"):
        read_event(text, NUMBERS, DOMAINS)


def test_help_says_domains_and_times(called, folder):
    schema = json.loads((folder / "schema.json").read_text())
    status, shown, _ = called("--help")
    assert status == 0
    text = " ".join(shown.split())
    assert "TIME:DOMAIN:ITEM" in text and "The model's times are" in text
    for entry in schema["domains"]:
        assert entry["name"] in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "the following arguments are required: DOMAIN, K"),
        (["domain 0"], "required: K"),
        (["domain 0", "x"], "invalid int value: 'x'"),
        (["domain 0", "0"], "K is 0: give at least 1"),
        (["nowhere", "3"], "there is no domain 'nowhere': it is one of"),
        (["domain 0", "3", "domain 0:5"], "TIME:DOMAIN:ITEM"),
        (["domain 0", "3", "--now", "nan"], "'nan' is no time"),
        (["domain 0", "3", "--then", "1"], "--then"),
    ],
)
def test_what_cannot_be_used_is_one_line(called, folder, arguments, named):
    schema = json.loads((folder / "schema.json").read_text())
    name = schema["domains"][0]["name"]
    words = [word.replace("domain 0", name) for word in arguments]
    status, shown, errors = called(*words)
    assert (status, shown) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert named in errors


def test_what_is_left_out_is_named_and_nothing_else_is_said(called, folder):
    schema = json.loads((folder / "schema.json").read_text())
    name = schema["domains"][0]["name"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an array that cannot be written to
        status, shown, errors = called(name, "3", f"17:{name}:none", "17:x:y")
    assert status == 0 and len(shown.splitlines()) == 3
    assert f"no item 'none' in {name}" in errors
    assert "no domain 'x'" in errors and errors.count("\n") == 2


def test_a_folder_without_an_export_is_one_line(called, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "__file__", str(tmp_path / "example.py"))
    status, _, errors = called("books", "3")
    assert status == 2 and "schema.json" in errors and errors.count("\n") == 1
    (tmp_path / "schema.json").write_text("{}")
    status, _, errors = called("books", "3")
    assert status == 2 and "is no schema" in errors and errors.count("\n") == 1
