"""Which files of a folder are logs: links, hidden names, other endings, partitions."""

import os
from pathlib import Path

import pytest

from trainer.data.logs.files import find_logs, partitions_of
from trainer.errors import InputError


def touch(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(folder, *inputs):
    """What is found behind inputs, as paths below the folder."""
    logs = find_logs([folder / name for name in inputs])
    return [str(log.path.relative_to(folder)) for log in logs]


def test_a_link_is_a_log_by_its_own_name(tmp_path):
    """The Hugging Face cache, git-annex and DVC link to files without an ending."""
    touch(tmp_path / "blobs/e3b0c442")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/log.parquet").symlink_to("../blobs/e3b0c442")
    assert names(tmp_path, "logs/log.parquet") == ["logs/log.parquet"]
    assert names(tmp_path, "logs") == ["logs/log.parquet"]


def test_a_file_by_two_names_is_read_once(tmp_path):
    touch(tmp_path / "logs/a.csv")
    (tmp_path / "logs/b.csv").symlink_to("a.csv")
    assert names(tmp_path, "logs", "logs/b.csv") == ["logs/a.csv"]


def test_links_to_folders_are_followed_and_circles_are_none(tmp_path):
    touch(tmp_path / "logs/a.csv")
    touch(tmp_path / "far/b.csv")
    (tmp_path / "logs/2024").symlink_to("../far")
    (tmp_path / "far/back").symlink_to("../logs")
    assert names(tmp_path, "logs") == ["logs/2024/b.csv", "logs/a.csv"]


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.csv").symlink_to("../gone.csv")
    with pytest.raises(InputError, match=r"a.csv is a link to \.\./gone.csv"):
        find_logs([tmp_path / "logs"])
    with pytest.raises(InputError, match="is a link to"):
        find_logs([tmp_path / "logs/a.csv"])


def test_hidden_names_are_passed_over_in_folders_alone(tmp_path):
    hidden = (
        ".ipynb_checkpoints/a.csv",
        "_temporary/a.csv",
        ".data.work/ids/users/0.parquet",
        "_SUCCESS.csv",
        ".a.csv",
    )
    for name in (*hidden, "_day=1/b.csv", "a.csv"):
        touch(tmp_path / "logs" / name)
    assert names(tmp_path, "logs") == ["logs/_day=1/b.csv", "logs/a.csv"]
    assert names(tmp_path, "logs/_SUCCESS.csv") == ["logs/_SUCCESS.csv"]


def test_what_is_passed_over_is_said(tmp_path, capsys):
    for name in ("a.pq", "b.csv.zst", "c.csv.bz2", "d.json", "readme.txt"):
        touch(tmp_path / "logs" / name)
    touch(tmp_path / "logs/old/dataset.json")
    touch(tmp_path / "logs/old/users.parquet")
    logs = find_logs([tmp_path / "logs"], verbose=True)
    assert [log.path.name for log in logs] == ["a.pq", "b.csv.zst"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for name in ("c.csv.bz2", "d.json", "readme.txt", "old"):
        assert name in said


def test_nothing_is_no_input(tmp_path):
    with pytest.raises(InputError, match="an input is empty"):
        find_logs([""])
    touch(tmp_path / "logs/a.csv.bz2")
    with pytest.raises(InputError, match=r"holds no log; it has a\.csv\.bz2"):
        find_logs([tmp_path / "logs"])
    with pytest.raises(InputError, match=r"with \.gz or \.zst behind it"):
        find_logs([tmp_path / "logs/a.csv.bz2"])


@pytest.mark.parametrize(
    ("path", "partitions"),
    [
        ("out/domain=a/part-0.parquet", (("domain", "a"),)),
        ("domain=books%2C films/x.csv", (("domain", "books, films"),)),
        ("day=1/domain=/x.csv", (("day", "1"), ("domain", ""))),
        ("domain=__HIVE_DEFAULT_PARTITION__/x.csv", (("domain", None),)),
        ("a=1.csv", ()),
        ("=1/x.csv", ()),
    ],
)
def test_folders_names_are_columns(path, partitions):
    assert partitions_of(Path(path)) == partitions


def test_a_glob_and_a_folder_give_the_same_columns(tmp_path, monkeypatch):
    touch(tmp_path / "out/domain=a/x.csv")
    monkeypatch.chdir(tmp_path)
    by_folder = find_logs(["out"])
    assert by_folder == find_logs(["out/domain=*"])
    assert by_folder == find_logs(["out/*/*.csv"])
    assert by_folder[0].partitions == (("domain", "a"),)
    assert by_folder[0].path.is_absolute() and os.path.isfile(by_folder[0].path)
