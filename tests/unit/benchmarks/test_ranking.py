"""The script measures ours in a small form, with or without FAISS, and its figures are of what it says."""

import json
import sys

import pytest

from benchmarks import ranking, suite
from tests.helpers.alone import as_a_script, in_this_process

OURS = ["top_k", "top_k with exclusions", "ranks"]


@pytest.mark.ranks
def test_every_line_is_measured_and_a_missing_peer_is_said(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(suite, "in_own_process", in_this_process)
    monkeypatch.setattr(ranking, "faiss", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "result.json"
    given = [
        "items=[500]",
        "dim=[8,16]",
        "users=40",
        "fewer_users=20",
        "excluded=3",
        "repeats=2",
        "window=0.001",
    ]
    monkeypatch.setattr(
        sys, "argv", ["ranking.py", "--json", str(file), *given]
    )
    with as_a_script():
        ranking.main()
    record = json.loads(file.read_text())
    assert record["faiss"] is None
    assert [(line["dim"], line["system"]) for line in record["results"]] == [
        (dim, name) for dim in (8, 16) for name in OURS
    ]
    for line in record["results"]:
        assert (
            len(line["seconds"]["all"]) == 2 and len(line["memory_bytes"]) == 2
        )
        assert line["users_per_second"] == pytest.approx(
            40 / line["seconds"]["median"]
        )
        assert line["rate"] == pytest.approx(
            2 * line["dim"] * 500 * line["users_per_second"]
        )
        assert line["share"] == pytest.approx(line["rate"] / line["limit"])
    assert "FAISS was not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("users=2048", "fewer_users is 2048: give less than users, 2048"),
        ("dim=[6]", "dim is [6]"),
        ("k=0", "k is 0"),
    ],
)
def test_bad_options_are_refused_in_words(argument, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("ranking", ranking.Settings, ["--short", argument])
    assert left.value.code == 2 and message in capsys.readouterr().err
