"""Real ranks on this machine: how they are started, and a small dataset to train on."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import PARTS
from tests.helpers.rank_processes import (
    forked_python,
    free_port,
    run_alone,
    run_ranks,
)
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS = [
    "max_steps=3",
    "global_batch_size=32",
    "log.tensorboard=false",
    "evaluation.negatives=40",
    "evaluation.batch_size=50",
]
MODEL = [
    *PARTS,
    "model.dim=16",
    "model.ffn_dim=16",
    "model.max_length=12",
    "model.experts=2",
    "model.cross_experts=1",
]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """400 users in three domains, one of them unrelated; shards of a few users each."""
    folder = tmp_path_factory.mktemp("distributed")
    config = SyntheticConfig(
        users=400, items=300, domains=3, mean_length=15, topics=8
    )
    synthesize_logs(folder / "logs", config)
    prepare(
        PrepareConfig(
            inputs=(str(folder / "logs"),), output=str(folder / "data")
        )
    )
    return folder / "data"


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A run of three steps by one rank."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(
        [
            BIN / "python",
            "launch/train.py",
            f"data={dataset}",
            f"run={folder}",
            *SETTINGS,
            *MODEL,
        ]
    )
    return folder


@pytest.fixture(scope="session")
def one_encoder(dataset, tmp_path_factory):
    """A run of a step whose export has one encoder, and not one more for each domain: each takes seconds."""
    folder = tmp_path_factory.mktemp("one encoder") / "run"
    own = ["max_steps=1", "model.prediction=cross", "model.time_knots=0"]
    words = [f"data={dataset}", f"run={folder}", *SETTINGS, *MODEL, *own]
    run([BIN / "python", "launch/train.py", *words])
    return folder


def deepspeed(ranks, script, *arguments, prefix=(), options=()):
    """The command that starts `ranks` local ranks of a script.

    `run` has the launcher's own processes forked where the stack is loaded, and so they their ranks.
    """
    return [
        *prefix,
        str(BIN / "deepspeed"),
        *(
            options
            or ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        ),
        str(script),
        *map(str, arguments),
    ]


@dataclass(frozen=True)
class Ranks:
    """Ranks that no launcher starts: what is left where the test is not about one."""

    ranks: int
    script: Path | str
    arguments: tuple


def ranks_of(ranks, script, *arguments):
    """For `run`, in place of `deepspeed(…)`: the same ranks, forked where the stack is loaded."""
    return Ranks(ranks, script, arguments)


def run(command, timeout=300, status=(0,), **environment):
    """Runs a command to its end; its output is shown where its status is none of the given ones."""
    if isinstance(command, Ranks):
        done = run_ranks(
            command.ranks,
            command.script,
            *command.arguments,
            timeout=timeout,
            **environment,
        )
        words = [command.ranks, "ranks of", command.script, *command.arguments]
    elif Path(command[0]) == BIN / "deepspeed":
        environment["FORKED_PYTHON"] = forked_python()
        done = run_alone(*command, timeout=timeout, **environment)
        words = command
    elif Path(command[0]) == BIN / "python":
        done = run_alone(*command[1:], timeout=timeout, **environment)
        words = command
    else:
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        words = command
    shown = f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert done.returncode % 256 in {code % 256 for code in status}, (
        f"status {done.returncode}\n{shown}"
    )
    return done
