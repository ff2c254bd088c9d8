import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no such thing')", 1, "no such thing\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        # What Python's teardown would wait for is not waited for.
        ("threading.Thread(target=time.sleep, args=(3600,)).start()", 0, ""),
        ("multiprocessing.get_context('fork').Process(target=time.sleep, args=(3600,)).start()", 0, ""),
    ],
)
def test_a_script_ends_with_its_status_and_all_that_it_printed(body, status, errors):
    program = f"""
import multiprocessing, sys, threading, time
from trainer.process import run_script
def main():
    print("said", end="")
    {body}
run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "said")
    assert errors in done.stderr if errors else done.stderr == ""
