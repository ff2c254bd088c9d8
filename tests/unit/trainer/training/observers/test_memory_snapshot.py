"""Snapshots at out-of-memory, with a device that is not there."""

import pytest
import torch

from trainer.distributed.process_group import Ranks
from trainer.training.observers.memory_snapshot import snapshot_out_of_memory

DEVICE = Ranks(3, 4, 0, torch.device("cuda", 0))
CPU = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def calls(monkeypatch):
    """What is asked of PyTorch."""
    calls = []

    def record(**options):
        calls.append(options)

    def dump(name):
        with open(name, "wb") as file:
            file.write(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def run_out(folder, ranks, remember=False, error=torch.OutOfMemoryError):
    with (
        pytest.raises(error),
        snapshot_out_of_memory(folder, ranks, remember),
    ):
        raise error("no room")


def test_a_device_leaves_a_snapshot_and_the_error_passes(
    tmp_path, calls, capsys
):
    run_out(tmp_path, DEVICE)
    file = tmp_path / "profile" / "memory-rank-00003.pickle"
    assert file.read_bytes() == b"snapshot" and calls == []
    assert str(file) in capsys.readouterr().err


def test_allocations_are_remembered_where_that_is_asked_for(tmp_path, calls):
    run_out(tmp_path, DEVICE, remember=True)
    assert calls == [{"max_entries": 100_000}, {"enabled": None}]


def test_neither_on_a_cpu_nor_for_another_error(tmp_path, calls):
    run_out(tmp_path, CPU, remember=True)
    run_out(tmp_path, DEVICE, error=ZeroDivisionError)
    assert calls == [] and list(tmp_path.iterdir()) == []


def test_a_snapshot_that_fails_does_not_hide_the_error(tmp_path, calls, capsys):
    (tmp_path / "profile").write_text("a file")
    run_out(tmp_path, DEVICE)
    assert "no snapshot of the memory" in capsys.readouterr().err
