"""The script saves and loads with every system at 1 and 2 ranks, its figures are of what it says, and it leaves nothing."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from benchmarks import checkpoint, suite
from tests.helpers.alone import group_of_one

ROWS = 3000
SAVED = [
    "ours",
    "DCP safetensors",
    "DCP safetensors async",
    "DCP pickle",
    "DCP pickle async",
    "file copy",
    "memory copy",
]
LOADED = ["ours", "DCP safetensors", "DCP pickle", "file copy"]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        checkpoint.main()
    return left.value.code


@pytest.mark.slow
@pytest.mark.ranks
def test_short_measures_every_system_and_cleans_up(
    monkeypatch, tmp_path, capfd
):
    file, folder = tmp_path / "result.json", tmp_path / "disk"
    folder.mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not run_main(
        monkeypatch,
        "--short",
        f"rows=[{ROWS}]",
        "repeats=2",
        f"folder={folder}",
        "--json",
        file,
    )
    assert not list(folder.iterdir())

    record = json.loads(file.read_text())
    lines = {
        (line["ranks"], line["system"]): line for line in record["results"]
    }
    assert list(lines) == [
        (ranks, system) for ranks in (1, 2) for system in SAVED
    ]
    for (_, system), line in lines.items():
        save = line["save"]
        assert (
            0 < save["blocking_seconds"]["median"] <= save["seconds"]["median"]
        )
        assert (
            save["seconds"]["min"]
            <= save["seconds"]["median"]
            <= save["seconds"]["max"]
        )
        assert len(save["seconds"]["all"]) == 2
        assert save["blocking_share"] == pytest.approx(
            save["blocking_seconds"]["median"] / 600
        )
        assert save["bytes_per_second"] == pytest.approx(
            line["bytes"] / save["seconds"]["median"]
        )
        assert (line["load"] is not None) == (system in LOADED)
        for place in ("disk", "cached") if line["load"] else ():
            assert line["load"][place]["bytes_per_second"] == pytest.approx(
                line["bytes"] / line["load"][place]["seconds"]["median"]
            )
    for ranks in (1, 2):
        assert_sizes(ranks, {system: lines[ranks, system] for system in SAVED})
        load = lines[ranks, "ours"]["load"]
        assert (
            0
            < load["disk"]["verify_seconds"]["median"]
            < load["disk"]["seconds"]["median"]
        )
        assert load["build_seconds"] > 0
        for system in (
            "ours",
            "DCP safetensors async",
            "DCP pickle async",
        ):  # these return before all is written
            save = lines[ranks, system]["save"]
            assert (
                save["blocking_seconds"]["median"] < save["seconds"]["median"]
            )
    assert (
        record["machine"]["versions"]["safetensors"]
        and record["date"]
        and not record["not_run"]
    )
    shown = capfd.readouterr()
    assert (
        f"| {ROWS:,} |     2 |" in shown.out
        and "FutureWarning" not in shown.err
    )


def assert_sizes(ranks, lines):
    """What each system wrote is the table, and with ours the dense model and Adam's two moments of it."""
    table = ROWS * 65 * 4
    for line in lines.values():
        assert line["table_bytes"] == table
        if line["files"]:
            assert line["bytes"] == sum(line["files"].values())
    ours = lines["ours"]["files"]
    tables = [name for name in ours if name.startswith("table-")]
    assert len(tables) == ranks
    assert (
        0 < sum(ours[name] for name in tables) - table < 1000 * ranks
    )  # headers
    assert ours["optimizer.safetensors"] == pytest.approx(
        2 * ours["dense.safetensors"], rel=0.02
    )
    assert (
        lines["ours"]["bytes"]
        > table + ours["dense.safetensors"] + ours["optimizer.safetensors"]
    )
    assert lines["file copy"]["files"] == ours
    assert lines["memory copy"]["bytes"] == table
    for name in ("DCP safetensors", "DCP pickle"):
        assert 0 < lines[name]["bytes"] - table < 10_000 * ranks
        assert lines[f"{name} async"]["bytes"] == pytest.approx(
            lines[name]["bytes"], abs=10
        )


@pytest.mark.ranks
def test_a_killed_rank_is_reported_and_the_others_are_kept(
    monkeypatch, tmp_path, capsys
):
    def killed(ranks, *arguments):
        raise ProcessExitedException(
            "process 1 terminated with signal SIGKILL", 1, 1, 9, "SIGKILL"
        )

    monkeypatch.setattr(suite, "on_ranks", killed)
    assert (
        run_main(
            monkeypatch,
            "--short",
            "ranks=[2]",
            "--json",
            tmp_path / "result.json",
        )
        == 1
    )
    assert "SIGKILL" in capsys.readouterr().out
    (left_out,) = json.loads((tmp_path / "result.json").read_text())["not_run"]
    assert (left_out["rows"], left_out["ranks"]) == (10**5, 2)


class Loaded:
    """A system that brings a table of its own."""

    name = "another"

    def __init__(self, folder, values):
        self._folder, self._values = folder, values

    def loading(self, fresh):
        return [lambda: fresh.table.shard()[1]["weight"].copy_(self._values)]

    def written(self):
        return self._folder


def test_a_load_is_held_against_what_was_saved(tmp_path):
    def trainer(values):
        table = SimpleNamespace(shard=lambda: (0, {"weight": values}))
        return SimpleNamespace(table=table, ranks=SimpleNamespace(first=True))

    saved = torch.arange(6.0).reshape(2, 3)
    with group_of_one():
        load = checkpoint.timed_load(
            Loaded(tmp_path, saved), trainer(saved), trainer(saved.clone())
        )
        assert load.keys() == {"from_disk", "disk", "cached"}
        with pytest.raises(
            ArithmeticError, match="another loads another table"
        ):
            checkpoint.timed_load(
                Loaded(tmp_path, saved + 1),
                trainer(saved),
                trainer(saved.clone()),
            )


def parse(*arguments):
    return suite.settings("checkpoint", checkpoint.Settings, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows=[9]"], "rows is [9]: give at least 10"),
        (["repeats=0"], "repeats is 0: give at least 1"),
        (["folder=/nowhere/at"], "folder /nowhere/at: there is no such folder"),
    ],
)
def test_bad_options_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse("--short", *arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_seen_before_anything_is_written(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=13 * 10**9)
    )
    assert parse("rows=[1000000]", f"folder={tmp_path}")
    with pytest.raises(SystemExit):
        parse(f"folder={tmp_path}")
    assert (
        "10000000 rows take 13.1 GB there for a while, and 13.0 GB are free"
        in capsys.readouterr().err
    )
