"""Sharded ranking is what NumPy makes of all scores, at any number of ranks, block and number of users at a time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.alone import group_of_one
from tests.embeddings import ranking_worker
from tests.embeddings.ranking_cases import CASES, brute_force

ROOT = Path(__file__).parents[2]
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker finds at each number of ranks."""
    folder, found = tmp_path_factory.mktemp("ranking"), {}
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone"]
    for ranks in RANKS:
        if ranks == 1:
            with group_of_one():
                ranking_worker.main(folder)
        else:
            command = [*torchrun, f"--nproc-per-node={ranks}", "-m", "tests.embeddings.ranking_worker", folder]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-5000:]
        found[ranks] = dict(np.load(folder / f"ranks-{ranks}.npz"))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_and_best_items_are_those_of_a_brute_force(results, ranks, name):
    for what, expected in brute_force(CASES[name]).items():
        np.testing.assert_array_equal(results[ranks][f"{name}_{what}"], expected, f"{what} of {name}")
