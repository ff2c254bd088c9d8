"""The script writes and prepares logs of every size, its figures are of what is on disk, and it leaves nothing."""

import json
import sys

import pytest

from benchmarks import prepare, suite

pytestmark = pytest.mark.ranks  # they start processes


def run_main(monkeypatch, file, folder, *arguments):
    given = ["--json", str(file), f"folder={folder}", "items=600", "memory=2GB"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *given, *arguments])
    prepare.main()
    return json.loads(file.read_text())


def test_every_size_is_measured_and_taken_away(monkeypatch, tmp_path, capfd):
    folder = tmp_path / "disk"
    folder.mkdir()
    record = run_main(
        monkeypatch, tmp_path / "result.json", folder, "users=[200,400]"
    )
    assert list(folder.iterdir()) == []
    assert [result["users"] for result in record["results"]] == [200, 400]
    for result in record["results"]:
        took = result["prepare"]
        assert (
            result["interactions"] > 30 * result["users"]
            and result["log_bytes"] > 0
        )
        assert result["interactions_per_second"] == pytest.approx(
            result["interactions"] / took["seconds"]
        )
        assert (
            0
            < result["shard_bytes"]
            < result["dataset_bytes"]
            <= took["peak_disk_bytes"]
        )
        assert (
            took["peak_memory_bytes"] > 50e6
            and result["synthesize"]["seconds"] > 0
        )
    assert record["machine"]["cores"] and "400" in capfd.readouterr().out


def test_kept_logs_are_taken_again_and_the_dataset_is_counted_whole(
    monkeypatch, tmp_path
):
    first = run_main(
        monkeypatch, tmp_path / "1.json", tmp_path, "users=[200]", "keep=true"
    )["results"][0]
    files = [
        path for path in (tmp_path / "data-200").rglob("*") if path.is_file()
    ]
    assert first["dataset_bytes"] == sum(path.stat().st_size for path in files)
    again = run_main(
        monkeypatch, tmp_path / "2.json", tmp_path, "users=[200]", "keep=true"
    )["results"][0]
    assert (
        again["synthesize"] is None
        and again["dataset_bytes"] == first["dataset_bytes"]
    )


def test_a_script_that_fails_ends_it(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"prepare\.py .* ended with status 2"):
        run_main(
            monkeypatch,
            tmp_path / "1.json",
            tmp_path,
            "users=[200]",
            "memory=1MB",
        )


def test_keeping_needs_a_folder(capsys):
    with pytest.raises(SystemExit):
        suite.settings("prepare", prepare.Settings, ["keep=true"])
    assert "keep is true: give the folder" in capsys.readouterr().err
