"""The script measures every part at every size, and a request's answer is the one that its vectors give."""

import json
import sys

import pytest
import torch

from benchmarks import serving, suite
from tests.helpers.alone import as_a_script, in_this_process


@pytest.mark.ranks
def test_every_part_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "in_own_process", in_this_process)
    threads = torch.get_num_threads()
    file = tmp_path / "result.json"
    given = [
        "items=[50,70]",
        "dim=[8]",
        "max_length=[4]",
        "threads=[1]",
        "requests=3",
        "warmup=1",
        "experts=2",
        "blocks=1",
    ]
    monkeypatch.setattr(
        sys, "argv", ["serving.py", "--json", str(file), *given]
    )
    try:
        with as_a_script():
            serving.main()
    finally:
        torch.set_num_threads(threads)
    lines = json.loads(file.read_text())["results"]
    assert [(line["part"], line["items"]) for line in lines] == [
        ("encoder", None), ("encoder and top k", 50), ("encoder and top k", 70)
    ]  # fmt: skip
    assert all(
        len(line["seconds"]) == 3 and line["median"] <= line["p99"]
        for line in lines
    )
    assert "encoder and top k" in capsys.readouterr().out


def test_an_answer_is_the_best_of_all_items():
    matrix, user = torch.randn(30, 4), torch.randn(1, 4)
    best = serving.answer(lambda: user, (), matrix, 5)
    assert (
        best.indices.tolist()
        == sorted(range(30), key=lambda row: -float(matrix[row] @ user[0]))[:5]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [("dim=[8,16]", "give one for each"), ("requests=0", "requests is 0")],
)
def test_bad_options_are_refused_in_words(argument, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("serving", serving.Settings, ["--short", argument])
    assert left.value.code == 2 and message in capsys.readouterr().err
