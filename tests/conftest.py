"""What holds for all tests: they take the CPU, also beside a device (tests/unit/test_cuda.py asks for it)."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before DeepSpeed is imported, here and in the processes that a test starts: it would take a device
# that it sees.
os.environ["DS_ACCELERATOR"] = "cpu"

# Before PyTorch is imported: beside another file of tests a second thread only waits for the first.
# Whatever a test starts inherits it; ranks have one thread anyway (tests/helpers/rank_processes.py).
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says nothing on a machine that does other work too. The same examples
# every time, so that a change fails by what it changes; `--hypothesis-profile=search` draws others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("same")

RANKS = Path(__file__).parent / "ranks"
# In this order they are run, and everything else after them: the longest first, so that of two
# processes that run tests neither waits for the other at the end.
FIRST = (RANKS, Path(__file__).parent / "unit/trainer")


def pytest_collection_modifyitems(items):
    """All of tests/ranks is of the lane `ranks`, and comes first."""
    for item in items:
        if item.path.is_relative_to(RANKS):
            item.add_marker(pytest.mark.ranks)
    items.sort(key=_position)


def _position(item):
    """Of a test's folder in FIRST."""
    for position, folder in enumerate(FIRST):
        if item.path.is_relative_to(folder):
            return position
    return len(FIRST)


def pytest_collection_finish():
    """What the imports have left stays: a collection need not walk it.

    There are some, and each would take half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def without_report(monkeypatch):
    """Runs in this process draw no page, which takes longer than a few steps take."""
    monkeypatch.setattr(
        "trainer.reporting.run_report.write_report",
        lambda run, has_ended=False: Path(run) / "report.html",
    )
