"""What a run leaves on disk, and whether two runs left the same."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from trainer.checkpoint.layout import list_checkpoints


def losses(run: Path):
    """The logged losses, by step."""
    records = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        record["step"]: record["loss"]
        for record in records
        if record["kind"] == "train"
    }


def tensors(run: Path):
    """Every tensor of the newest checkpoint, the table's files put together: weights and both optimizers' states."""
    folder = list_checkpoints(run)[0]
    found = {}
    for name in ("dense", "optimizer"):
        found |= {
            f"{name}: {key}": value
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
    shards = [load_file(file) for file in table_files(folder)]
    return found | {
        f"table: {key}": np.concatenate([shard[key] for shard in shards])
        for key in shards[0]
    }


def table_files(folder: Path) -> list[Path]:
    """A checkpoint's table files in the order of their rows: copies of the table do not lie as the ranks do."""

    def first_row(file):
        with safe_open(file, framework="np") as stored:
            return int(stored.metadata()["first_stored_row"])

    return sorted(folder.glob("table-*.safetensors"), key=first_row)


def assert_same(run: Path, other: Path, tolerance=0.0):
    """Same steps, losses, weights and optimizer states; to the bit, or to a relative difference."""
    assert list_checkpoints(run)[0].name == list_checkpoints(other)[0].name
    found, expected = losses(run), losses(other)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=tolerance, atol=0
    )
    found, expected = tensors(run), tensors(other)
    assert found.keys() == expected.keys()
    assert {
        "table: weight",
        "table: momentum1",
        "optimizer: step",
        "dense: correction.lambda_D",
    } <= found.keys()
    for name, value in expected.items():
        if tolerance:
            assert np.linalg.norm(found[name] - value) <= tolerance * max(
                np.linalg.norm(value), 1e-6
            ), name
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
