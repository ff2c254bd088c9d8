"""The simulated loaders open, hash and decode what real ones would, and the script writes what it finds."""

import json
import sys

import pytest

from benchmarks import loaders, suite
from tests.helpers.made import draw_histories, write_dataset
from trainer.data.format import shards
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaders") / "data"
    return write_dataset(
        folder,
        draw_histories(480, longest=40),
        cuts=range(30, 480, 30),
        streams=16,
        block_users=10,
    )


def test_figures_are_those_of_real_shards(dataset, monkeypatch):
    settings, _ = suite.settings(
        "loaders", loaders.Settings, ["--short", "host=4", "max_length=30"]
    )
    result = loaders.measure(dataset, 8, 10, settings)
    assert (result["ranks"], result["steps"], result["shards"]) == (
        8,
        BatchSchedule(dataset, 80, 8, 0).steps(0),
        16,
    )
    plan = BatchSchedule(dataset, 80, 8, settings.seed, max_length=30)
    opened, decoded, hashed = [], [], []
    block, digest = shards.ShardFile.block, shards.hashlib.file_digest
    monkeypatch.setattr(
        shards.ShardFile,
        "block",
        lambda file, number: decoded.append(file.shard) or block(file, number),
    )
    monkeypatch.setattr(
        shards.hashlib,
        "file_digest",
        lambda *given: hashed.append(given[0].name) or digest(*given),
    )

    def opening(dataset, shard, *arguments):
        opened.append(shard)
        return shards.ShardFile(dataset, shard, *arguments)

    for rank in range(8):
        reading = Histories.of_schedule(plan, open_shard=opening)
        for step in range(plan.steps(0)):
            reading.read(plan.users(0, step, rank), plan.home_shards(0, rank))
        reading.close()
    assert result["opened"]["mean"] == len(opened) / 8 > 2
    assert result["foreign"]["mean"] == len(opened) / 8 - 2
    assert 0 < result["away"]["max"] <= result["foreign"]["max"]
    assert result["decoded"]["mean"] == len(decoded) / 8
    assert len(hashed) == 16
    assert (
        result["hashed_bytes"]["mean"]
        == sum(shard.bytes for shard in dataset.shards) / 8
    )


@pytest.mark.ranks
def test_the_short_form_runs(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(
        sys,
        "argv",
        ["loaders.py", "--short", "--json", str(tmp_path / "l.json")],
    )
    loaders.main()
    (result,) = json.loads((tmp_path / "l.json").read_text())["results"]
    assert result["foreign"]["mean"] <= 4.5 and result["tokens"]["max"] < 1.02
    assert "| ranks |" in capfd.readouterr().out


def test_bad_options_are_refused_in_words(capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("loaders", loaders.Settings, ["ranks=[2,0]"])
    assert (
        left.value.code == 2
        and "ranks is [2, 0]: give at least 1" in capsys.readouterr().err
    )
