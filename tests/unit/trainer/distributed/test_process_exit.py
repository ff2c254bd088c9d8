import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.distributed.supervisor import supervise
from trainer.errors import InputError

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no such thing')", 1, "no such thing\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        # What Python's teardown would wait for is not waited for.
        ("threading.Thread(target=time.sleep, args=(3600,)).start()", 0, ""),
        (
            "multiprocessing.get_context('fork').Process(target=time.sleep, args=(3600,)).start()",
            0,
            "",
        ),
    ],
)
def test_a_script_ends_with_its_status_and_all_that_it_printed(
    body, status, errors
):
    program = f"""
import multiprocessing, sys, threading, time
from trainer.distributed.process_exit import run_script
def main():
    print("said", end="")
    {body}
run_script(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (status, "said")
    assert errors in done.stderr if errors else done.stderr == ""


SUPERVISED = """
import json, os, signal, sys, time
from trainer.distributed.process_exit import run_script
from trainer.distributed.supervisor import supervise
def main():
    supervise(int(os.environ["RESTARTS"]), pause=float(os.environ.get("PAUSE", 0.05)))
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(json.dumps(sys.argv[1:]) + chr(10))
    with open(os.environ["ATTEMPTS"]) as file:
        attempt = len(file.readlines())
    what = json.loads(os.environ["ENDS"])[attempt - 1]
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        print("waits", flush=True)
        time.sleep(3600)
    if what < 0:
        os.kill(os.getpid(), -what)
    sys.exit(what)
run_script(main)
"""


@pytest.fixture
def supervised(tmp_path):
    """Starts a script that supervises itself and whose attempts end as given: a status, -signal, or "wait"."""
    script, attempts, started = (
        tmp_path / "script.py",
        tmp_path / "attempts",
        [],
    )
    script.write_text(SUPERVISED)

    def start(ends, restarts, *arguments, script=script, **environment):
        environment |= {
            "PYTHONPATH": str(ROOT),
            "RESTARTS": str(restarts),
            "ENDS": json.dumps(ends),
            "ATTEMPTS": str(attempts),
        }
        command = [sys.executable, str(script), *arguments]
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | environment,
                start_new_session=True,
                **pipes,
            )
        )
        return started[-1]

    def tried():
        return [json.loads(line) for line in attempts.read_text().splitlines()]

    yield start, tried
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # its child too, which would keep the pipes open
        process.communicate()


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "told"),
    [
        (
            [1, 1, 0],
            5,
            0,
            ["status 1; restart 1 of 5", "status 1; restart 2 of 5"],
        ),
        (
            [1, 4, 1],
            2,
            1,
            ["status 1; restart 1 of 2", "status 4; restart 2 of 2"],
        ),
        ([-9, -9], 1, 128 + 9, ["signal 9; restart 1 of 1"]),
        ([-11, 7], 1, 7, ["signal 11; restart 1 of 1"]),
        ([0], 3, 0, []),
        ([2], 3, 2, []),
        ([3], 3, 3, []),
        ([75], 3, 75, []),
        ([1, 2], 3, 2, ["status 1; restart 1 of 3"]),
        ([5], 0, 5, []),
    ],
)
def test_a_supervised_command_is_begun_again_where_that_may_help(
    supervised, ends, restarts, status, told
):
    start, tried = supervised
    process = start(ends, restarts, "data=DIR", "seed=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines() == [
        f"rank 0: ended with {text} in 0 s" for text in told
    ]
    assert tried() == [["data=DIR", "seed=3"]] * len(ends)


def test_only_the_first_attempt_is_fresh(supervised):
    start, tried = supervised
    start(
        [1, 1, 0], 2, "--fresh", "run=DIR", "--max-restarts", "2"
    ).communicate(timeout=60)
    others = ["run=DIR", "--max-restarts", "2"]
    assert tried() == [["--fresh", *others], others, others]


def test_a_command_is_restarted_as_it_was_typed(supervised, tmp_path):
    """`syncrec train` is no script of that name."""
    console = tmp_path / "syncrec.py"
    console.write_text(
        "import runpy, sys\n"
        "sys.argv = ['syncrec train', *sys.argv[2:]]\n"
        f"runpy.run_path({str(tmp_path / 'script.py')!r}, run_name='__main__')"
    )
    start, tried = supervised
    process = start([1, 0], 2, "train", "run=DIR", script=console)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert tried() == [["run=DIR"], ["run=DIR"]]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 1), (signal.SIGINT, 130)],
)
def test_a_request_to_stop_reaches_the_child_and_ends_both(
    supervised, number, status
):
    """Whatever the child ends with, it is not begun again."""
    start, tried = supervised
    process = start(["wait", 0], 3)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, "") and len(tried()) == 1


def test_a_request_to_stop_between_two_attempts_begins_no_other(supervised):
    start, tried = supervised
    process = start([1, 0], 3, PAUSE="3")
    assert "restart 1 of 3" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(tried()) == 1 and process.returncode != 0


def test_the_child_supervises_nothing(monkeypatch):
    monkeypatch.setenv("SYNCREC_UNDER_SUPERVISION", "1")
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(3) is None
    assert signal.getsignal(signal.SIGTERM) == before


def test_torchrun_restarts_by_itself(monkeypatch):
    monkeypatch.delenv("SYNCREC_UNDER_SUPERVISION", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    with pytest.raises(
        InputError,
        match=r"^--max-restarts: torchrun restarts by itself, give it to torchrun",
    ):
        supervise(3)
