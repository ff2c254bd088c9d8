"""An output is there whole or not at all; what a kill left is resumed, or begun anew."""

import pytest

from trainer.errors import InputError
from trainer.files.staged import (
    StagedOutput,
    new_output_folder,
    staged_folder,
    work_folder,
)


def test_finished_stages_are_resumed_and_unfinished_ones_are_not(tmp_path):
    output = tmp_path / "output"
    with StagedOutput(output, {"seed": 1}) as work:
        with work.stage("ids") as folder:
            (folder / "file").write_text("1")
        with pytest.raises(RuntimeError), work.stage("events") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError
    with StagedOutput(output, {"seed": 1}) as work:
        assert work.done("ids") and not work.done("events")
        assert not work.begun_anew
        work.deliver("ids")
    assert (output / "file").read_text() == "1"
    assert not work_folder(output).exists()


def test_another_identity_begins_anew_or_is_refused(tmp_path):
    output = tmp_path / "output"
    with StagedOutput(output, {"seed": 1, "k": 2}) as work, work.stage("ids"):
        pass
    with pytest.raises(InputError, match="seed was 1, is 3: put it back"):
        StagedOutput(output, {"seed": 3, "k": 2}, refuse=True)
    with StagedOutput(output, {"seed": 3, "k": 2}) as work:
        assert work.begun_anew and not work.done("ids")
    with StagedOutput(output, {"seed": 4}, fresh=True, refuse=True) as work:
        assert not work.done("ids")


def test_one_process_at_a_time(tmp_path):
    with (
        StagedOutput(tmp_path / "output", 1),
        pytest.raises(InputError, match="being written"),
    ):
        StagedOutput(tmp_path / "output", 1)


@pytest.mark.parametrize(
    "make", [lambda output: StagedOutput(output, 1), new_output_folder]
)
def test_an_output_that_holds_something_stays(tmp_path, make):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").write_text("1")
    with (
        pytest.raises(InputError, match="already holds something"),
        make(tmp_path / "output"),
    ):
        pass
    assert (tmp_path / "output" / "mine").read_text() == "1"


def test_a_new_folder_leaves_nothing_where_it_fails(tmp_path):
    with (
        pytest.raises(RuntimeError),
        new_output_folder(tmp_path / "output") as (folder, _),
    ):
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_one_is_first(tmp_path):
    with pytest.raises(OSError), staged_folder(tmp_path / "part", "a") as slow:
        (slow / "file").write_text("a")
        with staged_folder(tmp_path / "part", "b") as fast:
            (fast / "file").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert (tmp_path / "part" / "file").read_text() == "b"
