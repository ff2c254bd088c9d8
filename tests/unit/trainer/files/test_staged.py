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


def test_an_output_that_is_a_link_comes_to_be_where_the_link_points(tmp_path):
    """A mounted volume by another name; the link stays."""
    (tmp_path / "real").mkdir()
    for name in ("real", "not there yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(name)
        with StagedOutput(link, {}) as work:
            with work.stage("whole") as folder:
                (folder / "file").write_text("1")
            work.deliver("whole")
        assert link.is_symlink() and (link / "file").read_text() == "1"
        assert (tmp_path / name / "file").is_file()
        assert not work_folder(link).exists()
    link = tmp_path / "third"
    link.symlink_to("target")
    with new_output_folder(link) as (folder, _):
        (folder / "file").write_text("2")
    assert link.is_symlink() and (link / "file").read_text() == "2"
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


@pytest.mark.parametrize(
    "begin",
    [lambda o: StagedOutput(o, {}), lambda o: new_output_folder(o).__enter__()],
)
def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch, begin):
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(
        "os.path.ismount", lambda path: str(path) == str(volume)
    )
    with pytest.raises(
        InputError, match=r"is where a volume is mounted.*volume/data"
    ):
        begin(volume)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_an_output_without_a_name_is_refused():
    with pytest.raises(InputError, match="output is empty"):
        StagedOutput("", {})
