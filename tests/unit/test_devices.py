"""Tests take the CPU, also beside a device, unless they ask for it (tests/unit/test_cuda.py)."""

import re
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest

from tests.helpers import rank_processes
from tests.helpers.alone import deepspeed_on

ROOT = Path(__file__).parents[2]

# Beside a device, as far as Python can tell; `start` would set it, which fails here.
PROGRAM = """
import torch
torch.cuda.is_available = lambda: True
from trainer.distributed import deepspeed_engine, process_group
import deepspeed
with process_group.join_process_group() as ranks:
    print(ranks.device, deepspeed.accelerator.get_accelerator().device_name())
"""


def accelerator():
    return deepspeed.accelerator.get_accelerator().device_name()


@pytest.mark.ranks
def test_a_process_that_a_test_starts_takes_the_cpu_beside_a_device():
    """The run's device and DeepSpeed's are one choice."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["cpu", "cpu"], done.stderr[-2000:]


class Ended:
    """A rank that has ended well."""

    returncode = 0
    stdout = "said"
    stderr = ""


def test_the_ranks_of_a_test_see_no_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    started = []

    def start(command, environment, module):
        started.append((command, environment))
        return Ended()

    monkeypatch.setattr(rank_processes, "RankProcess", start)
    said = rank_processes.run_on_cpu_ranks(
        3, "tests.helpers.table_worker", "folder"
    )
    assert said == "said" * 3
    for rank, (command, environment) in enumerate(started):
        assert command[-1] == "folder"
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (
            str(rank),
            "3",
        )


@pytest.mark.parametrize(
    "folder", ["embeddings", "trainer", "syncrec", "syncrec_kernels"]
)
def test_all_ranks_are_started_in_one_place(folder):
    """It hides devices from them: a host with one device has none for ranks 1 and 2."""
    starts = re.compile(r"nproc|--num_gpus|with_name\(.torchrun.\)")
    files = sorted((ROOT / "tests/unit" / folder).rglob("*.py"))
    starting = [
        str(file.relative_to(ROOT))
        for file in files
        if starts.search(without_docstring(file.read_text()))
    ]
    assert files and starting == []


def without_docstring(source):
    return re.sub(r'^""".*?"""', "", source, count=1, flags=re.DOTALL)


def test_deepspeed_is_on_the_cpu_here_and_elsewhere_where_it_is_asked_for():
    assert accelerator() == "cpu"
    with deepspeed_on("cuda"):
        assert accelerator() == "cuda"
    assert accelerator() == "cpu"
