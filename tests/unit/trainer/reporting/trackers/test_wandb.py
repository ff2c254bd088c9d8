"""W&B, offline: what it leaves on disk."""

import json
import struct
import time

import pytest

from trainer.reporting.trackers.tracker import TrackedRun, read_identity
from trainer.reporting.trackers.wandb import WeightsAndBiases

wandb = pytest.importorskip(
    "wandb", reason="needs the extra wandb (CONTRIBUTING.md)"
)
SECRET = "hunter2hunter2hunter2hunter2hunter2hunter2"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr("sys.argv", ["train.py", f"data=https://u:{SECRET}@h"])


def open_run(folder, resume_step=None):
    folder.mkdir(exist_ok=True)
    tracker = WeightsAndBiases(
        TrackedRun(folder, "first", "shops", {"model.dim": 64}, resume_step)
    )
    tracker.begin()
    return tracker


def read_payloads(data):
    """The payloads of a .wandb file: LevelDB's log format after a head of 7 bytes.

    Blocks of 32 KiB hold pieces, each with checksum, length, and type: whole, first, middle, last.
    """
    place, payload = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield payload
            payload = b""
        elif kind == 0:  # not written yet
            return


def read_run(folder):
    """What an offline run has on disk: {kind: records}. W&B's own process may still write it."""
    for _ in range(100):
        records = read_records(folder)
        if "exit" in records:
            return records
        time.sleep(0.1)
    raise AssertionError(f"no end in {list(records)}")


def read_records(folder):
    """The records that are there."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    records = {}
    for payload in read_payloads(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(record, kind))
    return records


def rows(records):
    """The history: {key: value} of each row."""
    found = []
    for history in records["history"]:
        row = {}
        for item in history.item:
            key = item.key or "/".join(item.nested_key)
            row[key] = json.loads(item.value_json)
        found.append(row)
    return found


@pytest.mark.ranks
def test_a_run_has_config_figures_and_no_secret(tmp_path, capfd):
    folder = tmp_path / "run"
    tracker = open_run(folder)
    tracker.log({"loss/total": 2.5, "phi/Toys & games": 0.5}, 10)
    tracker.log({"validation mean/NDCG@10": 0.5}, 10)
    tracker.log({"loss/total": 2.0}, 20)
    tracker.log({"loss/total": 9.0}, 10)  # of before a resume
    tracker.summarize({"test mean/NDCG@10": 0.25}, 10)
    (folder / "report.html").write_text("the page")
    tracker.add_file(folder / "report.html")
    tracker.end("finished")
    (offline,) = (folder / "wandb").glob("offline-run-*")
    identity = read_identity(folder, "wandb")
    assert offline.name.endswith(identity)
    records = read_run(offline)
    first, second = rows(records)
    assert (first["_step"], first["loss/total"]) == (10, 2.5)
    assert first["validation mean/NDCG@10"] == 0.5
    assert first["phi/Toys & games"] == 0.5
    assert (second["_step"], second["loss/total"]) == (20, 2.0)
    run = records["run"][0]
    assert (run.project, run.display_name) == ("shops", "first")
    assert "model.dim" in str(run.config)
    assert "test mean/NDCG@10" in str(records["summary"])
    assert (offline / "files" / "report.html").read_text() == "the page"
    for file in folder.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    # Resumed, it goes on in the same run.
    tracker = open_run(folder, resume_step=20)
    tracker.log({"loss/total": 1.0}, 30)
    tracker.end("finished")
    assert read_identity(folder, "wandb") == identity
    names = [place.name for place in (folder / "wandb").glob("offline-run-*")]
    assert len(names) == 2 and all(name.endswith(identity) for name in names)
