"""Real ranks for a test, on the CPU whatever the machine has: who wants a device says so."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# PyTorch sees no device, and DeepSpeed, which looks for itself, takes the CPU. One thread a rank.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def cpu_environment(**more: str) -> dict[str, str]:
    """This process's environment for another one that is to run on the CPU."""
    return os.environ | ON_CPU | more


def start_on_cpu_ranks(
    ranks: int, module: str, *arguments
) -> subprocess.CompletedProcess:
    """Runs a module by torchrun, on so many ranks of this host, to its end."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        torchrun,
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        module,
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_on_cpu_ranks(ranks: int, module: str, *arguments) -> str:
    """The same, which has to end well; returns what they printed."""
    done = start_on_cpu_ranks(ranks, module, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
