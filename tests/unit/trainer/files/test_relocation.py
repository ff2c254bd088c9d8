"""Recorded paths, after what they lead to was moved or from another working folder."""

from pathlib import Path

import pytest

from trainer.files.relocation import find_moved, relocate


@pytest.mark.parametrize(
    ("recorded", "anchor", "now", "expected"),
    [
        ("data/all", "runs/1", "/home/a/runs/1", "/home/a/data/all"),
        ("../data", "runs/1", "/home/a/runs/1", "/home/a/../data"),
        (
            "/old/d/1/dataset",
            "/old/d/1/run",
            "/new/d/1/run",
            "/new/d/1/dataset",
        ),
        ("/old/s/data", "/old/s/run", "/old/t/run", "/old/t/data"),
        ("/data/all", "/old/runs/1", "/new/runs/1", None),
        ("data/all", "runs/1", "/home/a/runs/renamed", None),
        ("data/all", "", "/home/a/runs/1", "/home/a/runs/1/data/all"),
    ],
)
def test_a_path_stands_to_its_anchor_as_before(recorded, anchor, now, expected):
    moved = relocate(recorded, anchor, Path(now))
    assert moved == (None if expected is None else Path(expected))


def test_a_folder_is_found_below_what_was_moved(tmp_path):
    run = tmp_path / "new" / "days" / "1" / "run"
    run.mkdir(parents=True)
    root = tmp_path / "new"
    assert find_moved("/old/days/1/run", root) == run
    assert find_moved(str(run), Path("/elsewhere")) == run
    assert find_moved("/old/run", root) == Path("/old/run")
    assert find_moved("/old/days/2/run", root) == Path("/old/days/2/run")
