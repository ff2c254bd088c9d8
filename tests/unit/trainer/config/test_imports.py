"""What a training process loads, and what it leaves to those that need it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.made import draw_histories, write_dataset
from tests.helpers.runs import SETTINGS

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[4]
WATCHED = ("duckdb", "plotly", "jinja2", "pyarrow")

# A run as launch/train.py makes it, ended in its first step.
PROGRAM = f"""
import json, os, sys

loaded = {{}}

def note(when):
    loaded[when] = [name for name in {WATCHED} if name in sys.modules]

import trainer.config.load
note("config")
import trainer.training.loop
note("loop")
from trainer.distributed import process_group
from trainer.training.step import Trainer

def first_step(self, *arguments, **named):
    note("step")
    print(json.dumps(loaded), flush=True)
    os._exit(0)

Trainer.train_step = first_step
with process_group.join_process_group() as ranks:
    trainer.training.loop.train(trainer.config.load.load_config([], sys.argv[1:]), ranks)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Which of WATCHED are loaded with the configuration, then with the loop, and in the first step."""
    folder = tmp_path_factory.mktemp("imports")
    dataset = write_dataset(folder / "data", draw_histories(20))
    settings = [
        f"data={dataset.folder}",
        f"run={folder / 'run'}",
        *SETTINGS,
        "log.tensorboard=false",
    ]
    command = [sys.executable, "-c", PROGRAM, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_settings_load_neither_engines_nor_plots_nor_arrow(loaded):
    assert loaded["config"] == []


def test_the_package_of_settings_loads_nothing_heavy():
    heavy = (
        "torch",
        "deepspeed",
        "torchrec",
        "fbgemm_gpu",
        "pyarrow",
        "duckdb",
        "numpy",
    )
    program = f"""
import sys, pkgutil, importlib, trainer.config, trainer.run_files
for module in pkgutil.iter_modules(trainer.config.__path__):
    importlib.import_module(f"trainer.config.{{module.name}}")
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_training_process_loads_no_query_engine_and_no_page(loaded):
    assert loaded["loop"] == []


def test_up_to_its_first_step_arrow_alone_which_unpacks_blocks(loaded):
    assert loaded["step"] == ["pyarrow"]


def test_a_step_is_measured_without_a_query_engine():
    names = f"[name for name in {WATCHED} if name in sys.modules]"
    program = f"import sys, benchmarks.workload; print({names})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
