"""A damaged shard that one of two ranks meets."""

import json
import shutil

import pytest

from tests.helpers.left import losses
from tests.ranks.test_resume import train
from trainer.checkpoint.layout import list_checkpoints
from trainer.data.format.dataset import Dataset


@pytest.fixture
def damaged(dataset, tmp_path):
    """The dataset with one byte of one shard flipped, in the middle of a block's items."""
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    shard = folder / Dataset.load(folder).shards[5].name
    content = bytearray(shard.read_bytes())
    place = (
        content.index(b".items.low.npy") + 512 + 200
    )  # past the member's tar header and the array's own
    content[place] ^= 1
    shard.write_bytes(content)
    return folder, shard


def test_it_stops_both_ranks_with_one_line_and_no_trace(damaged, tmp_path):
    folder, shard = damaged
    done = train(2, folder, tmp_path / "run", "max_steps=40", status=(2,))
    assert f"{shard}: its sha256 is not the one in dataset.json" in done.stderr
    assert (
        "Traceback" not in done.stderr and "lost the others" not in done.stderr
    )
    assert (
        list_checkpoints(tmp_path / "run") == []
    )  # its steps' figures may stay, and are no obstacle to the same command


def test_skipping_is_the_same_at_any_number_of_ranks(damaged, tmp_path):
    folder, shard = damaged
    settings = [
        "max_steps=28",
        "epochs=2",
        "stream.damaged=skip",
        "stream.workers=1",
    ]
    seen = {}
    for ranks in (1, 2):
        done = train(ranks, folder, tmp_path / str(ranks), *settings)
        assert (
            f"{shard}: block 0: its checksum (CRC-32) is wrong" in done.stderr
        )
        assert (
            done.stderr.count("its checksum (CRC-32) is wrong") <= ranks
        )  # once by each that reads it
        records = [
            json.loads(line)
            for line in (tmp_path / str(ranks) / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        counted = {
            record["step"]: record["skipped_users"]
            for record in records
            if record["kind"] == "train"
        }
        users = sum(counted.values())
        assert (
            users > 0
            and f"{users} users were skipped in training" in done.stdout
        )
        seen[ranks] = counted, losses(tmp_path / str(ranks))
    assert seen[1][0] == seen[2][0]
    assert list(seen[1][1].values()) == pytest.approx(
        list(seen[2][1].values()), rel=1e-5
    )
