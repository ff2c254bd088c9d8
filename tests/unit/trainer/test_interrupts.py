"""Ctrl-C in a command, from its first import on."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import COMMANDS
from trainer import interrupts

ROOT = Path(__file__).parents[3]
SCRIPTS = [name for name in COMMANDS if name != "stack"]


@pytest.fixture
def sigint():
    """The handler of SIGINT is put back."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ctrl_c(monkeypatch):
    """Nobody has pressed it in this process yet; returns what a second press calls."""
    ended = []
    monkeypatch.setattr(interrupts, "_ctrl_c", interrupts.CtrlC())
    monkeypatch.setattr(interrupts, "end_at_once", lambda: ended.append(1))
    return ended


def test_a_command_at_work_is_interrupted_once_a_press(
    sigint, ctrl_c, monkeypatch
):
    interrupts.end_on_interrupt()
    interrupts.begin_work()
    assert not interrupts.is_interrupted()
    with pytest.raises(KeyboardInterrupt):
        sigint()
    sigint()  # a launcher passes on what the terminal has sent
    assert interrupts.is_interrupted() and ctrl_c == []
    later = time.monotonic() + 2
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: later)
    sigint()
    assert ctrl_c == [1]


def test_what_a_notebook_does_with_ctrl_c_stays(sigint):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.begin_work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nohup_stays_in_force(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in interrupts.stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in interrupts.stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_hears_ctrl_c_before_it_imports_anything_else(name):
    source = (ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")
    _, first, second, *_ = ast.parse(source).body
    assert ast.unparse(first).startswith("from trainer.interrupts import ")
    assert ast.unparse(second) == (
        "if __name__ == '__main__':\n    end_on_interrupt()"
    )


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*SCRIPTS, "syncrec"])
def test_ctrl_c_during_an_import_is_one_line(name, tmp_path):
    """All scripts import OmegaConf: here it takes for ever.

    In short sleeps: Python hears of a signal that comes just before a sleep only after it.
    """
    (tmp_path / "omegaconf.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "for _ in range(1200): time.sleep(0.05)"
    )
    words = [ROOT / "launch" / f"{name}.py"]
    if name == "syncrec":
        words = ["-m", "launch.cli", "prepare"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")


WORKS = """
import sys, time
from trainer.distributed.process_exit import run_script
from trainer.interrupts import begin_work
def main():
    begin_work()
    try:
        print("works", flush=True)
        for _ in range(1200):
            time.sleep(0.05)
    finally:
        print("takes away what is half made", flush=True)
        {ending}
run_script(main, goes_on=True)
"""


def _start(ending):
    return subprocess.Popen(
        [sys.executable, "-c", WORKS.format(ending=ending)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    "ending", ["pass", "raise RuntimeError('Query interrupted')"]
)
def test_a_command_takes_away_what_is_half_made(ending):
    process = _start(ending)
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert output == "takes away what is half made\n"
    assert (process.returncode, errors) == (130, interrupts.GOES_ON + "\n")


@pytest.mark.ranks
def test_a_second_ctrl_c_ends_at_once():
    process = _start("time.sleep(60)")
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "takes away what is half made\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")
