"""What a backend raises where other ranks are gone, and the device that a process takes."""

import json
import os
import socket
import subprocess
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist

from tests.ranks.conftest import free_port
from trainer.distributed import process_group
from trainer.distributed.launchers import World
from trainer.distributed.process_group import (
    choose_device,
    record_collectives,
    translate_backend_errors,
)
from trainer.errors import InputError, LostRanks

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
CLOSED = f"{GLOO}Connection closed by peer [10.0.0.7]:41022\nmore"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(CLOSED),
            "Connection closed by peer [10.0.0.7]:41022 more",
        ),
        (
            RuntimeError(f"{GLOO}Read error [::1]:7: Connection reset by peer"),
            "Read error [::1]:7: Connection reset by peer",
        ),
        (
            RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1000ms"),
            "Timed out waiting 1000ms",
        ),
        (
            RuntimeError("Application timeout caused pair closure"),
            "Application timeout caused pair closure",
        ),
        (
            RuntimeError(f"{GLOO}Application timeout caused pair closure"),
            "Application timeout caused pair closure",
        ),
        (
            RuntimeError(f"{GLOO}writev [10.0.0.7]:1: Broken pipe"),
            "writev [10.0.0.7]:1: Broken pipe",
        ),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1."),
            "NCCL communicator was aborted on rank 1.",
        ),
        (
            dist.DistNetworkError("Connection reset by peer"),
            "Connection reset by peer",
        ),
        (dist.DistBackendError("NCCL " + "x" * 1000), "NCCL " + "x" * 155),
    ],
)
def test_what_a_backend_raises_is_one_line_of_its_own_rank(
    monkeypatch, error, reason
):
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(LostRanks) as lost, translate_backend_errors():
        raise error
    line = str(lost.value)
    assert (
        line.startswith(
            f"rank 5: lost the others ({reason}): another rank or host is gone"
        )
        and "\n" not in line
    )
    assert lost.value.status == 4
    assert (
        lost.value.__cause__ is error
    )  # whose trace is printed below the line


def test_a_rank_that_never_comes_is_one_line():
    """What the backend really raises, where a group of two is joined by one."""
    store = dist.TCPStore(
        "127.0.0.1",
        free_port(),
        2,
        True,
        timedelta(seconds=0.5),
        wait_for_workers=False,
    )
    with (
        pytest.raises(LostRanks, match=r"^rank \d+: lost the others \("),
        translate_backend_errors(),
    ):
        dist.init_process_group(
            "gloo",
            store=store,
            rank=0,
            world_size=2,
            timeout=timedelta(seconds=0.5),
        )
    assert not dist.is_initialized()


def raised_in_torch_distributed(text):
    exec(
        compile(
            f"raise RuntimeError({text!r})",
            "/lib/torch/distributed/new.py",
            "exec",
        )
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("Connection closed by peer"),
        OSError(28, "No space left on device"),
        InputError("data=DIR is missing"),
        KeyboardInterrupt(),
        torch.OutOfMemoryError(
            "CUDA out of memory. NCCL has 2 GiB. Timed out waiting"
        ),
        torch.OutOfMemoryError(f"{GLOO}Connection closed by peer"),
        RuntimeError("the server timed out"),
        RuntimeError("it is said that Application timeout caused pair closure"),
        RuntimeError("gloo and NCCL are installed"),
        RuntimeError(
            "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length. 16 vs 4"
        ),
    ],
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as passed, translate_backend_errors():
        raise error
    assert passed.value is error


def test_a_fault_in_torch_distributed_is_a_fault():
    with (
        pytest.raises(RuntimeError, match="words that nobody knows"),
        translate_backend_errors(),
    ):
        raised_in_torch_distributed("words that nobody knows")


def test_a_tensor_of_a_wrong_size_is_a_fault(ranks):
    with (
        pytest.raises((ValueError, RuntimeError)) as fault,
        translate_backend_errors(),
    ):
        dist.all_gather([torch.empty(3)], torch.ones(4))
    assert not isinstance(fault.value, LostRanks)


CHOSEN = [
    # asked for, DS_ACCELERATOR, is there a device: what it is
    ("auto", None, True, "cuda"),
    ("auto", None, False, "cpu"),
    ("auto", "cpu", True, "cpu"),
    ("auto", "cuda", False, "cpu"),
    ("cpu", None, True, "cpu"),
    ("cpu", "cuda", True, "cpu"),
    ("cuda", None, True, "cuda"),
    ("cuda", "cpu", True, "cuda"),
]


@pytest.fixture
def device(monkeypatch):
    """device(there, switch): whether there is a CUDA device, and what DS_ACCELERATOR says."""
    monkeypatch.delitem(process_group.sys.modules, "deepspeed", raising=False)

    def have(there, switch=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setenv("DS_ACCELERATOR", switch or "")
        if switch is None:
            monkeypatch.delenv("DS_ACCELERATOR")

    return have


@pytest.mark.parametrize(("asked", "switch", "there", "chosen"), CHOSEN)
def test_the_device_is_what_was_asked_for(device, asked, switch, there, chosen):
    device(there, switch)
    assert choose_device(asked) == chosen
    expected = switch if asked == "auto" else asked
    assert os.environ.get("DS_ACCELERATOR") == expected  # for DeepSpeed


@pytest.mark.parametrize("asked", ["cuda", "gpu", "cuda:1", ""])
def test_a_device_that_is_not_there_is_refused_in_a_line(device, asked):
    device(False)
    with pytest.raises(InputError, match=r"device is .*(cpu)") as refused:
        choose_device(asked)
    assert str(refused.value).isprintable()
    assert "DS_ACCELERATOR" not in os.environ


def test_deepspeed_stays_where_it_has_computed(device, monkeypatch):
    device(True)
    monkeypatch.setitem(process_group.sys.modules, "deepspeed", deepspeed)
    with pytest.raises(InputError, match="has computed on cpu"):
        choose_device("cuda")
    assert choose_device("cpu") == "cpu"


def test_the_flight_recorder_leaves_what_is_set_already(tmp_path, monkeypatch):
    names = (
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "TORCH_FR_DUMP_TEMP_FILE",
    )
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    record_collectives(tmp_path / "nccl")
    values = [os.environ[name] for name in names]
    assert values == ["7", "1", f"{tmp_path}/nccl/rank-"]


@pytest.mark.ranks
def test_who_replaces_a_rank_that_has_ended_asks_all_to_begin_anew(monkeypatch):
    """A pod that is replaced while the others wait: no mistake of whoever started it."""
    store = dist.HashStore()
    monkeypatch.setattr(process_group, "_reach_store", lambda *_: store)
    world = World(1, 2, 0, 1, "127.0.0.1", 1)
    patience = timedelta(seconds=5)
    process_group._open_store(world, patience)
    with pytest.raises(InputError, match="rank 1 is taken at 127"):
        process_group._open_store(world, patience)
    with subprocess.Popen(["sleep", "600"]) as before:
        started = process_group._read_start(before.pid)
        assert started is not None
        own = json.dumps([socket.gethostname(), before.pid, started])
        store.set("rank-1-process", own)
        with pytest.raises(InputError, match="rank 1 is taken at 127"):
            process_group._open_store(world, patience)
        before.kill()
    with pytest.raises(LostRanks, match="all have to begin anew"):
        process_group._open_store(world, patience)
    elsewhere = json.dumps(["another host", before.pid, started])
    store.set("rank-1-process", elsewhere)
    with pytest.raises(InputError, match="rank 1 is taken at 127"):
        process_group._open_store(world, patience)
