"""The whole way on synthetic logs: writes them, prepares them, trains on two ranks, evaluates.

python launch/demo.py --output DIR
"""

from trainer.interrupts import INTERRUPTED, begin_work, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.child_processes import StoppableCommands
from trainer.config.command_line import option, parse_options
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error
from trainer.run_files import REPORT

_LAUNCH = Path(__file__).resolve().parent
_LOG_SIZE = "--users 6000 --items 4000 --domains 4 --mean-length 40"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    output: str = option(
        "a folder; what an earlier demo left in it is replaced", metavar="DIR"
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Runs what a person would type, and shows it."""
    output = Path(parse().output)
    begin_work()
    logs = output / "logs"
    data = output / "data"
    run = output / "run"
    for folder in (logs, data, run):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}): give another --output"
        ) from None
    preset = _LAUNCH / "configs/demo.yaml"
    _run("python", "synthesize.py", "--output", logs, *_LOG_SIZE.split())
    _run("python", "prepare.py", "--input", logs, "--output", data)
    # Without --quiet DeepSpeed's launcher says eleven lines of its own.
    two_ranks = ("deepspeed", "--quiet", "--num_gpus", "2")
    _run(
        *two_ranks, "train.py", "--config", preset, f"data={data}", f"run={run}"
    )
    _run(*two_ranks, "evaluate.py", "--run", run)
    print(
        f"\nOpen {run / REPORT} in a browser: λ and φ by domain, losses, metrics."
    )


def _run(*command: str | Path) -> None:
    """Shows and runs a command; ends the demo with its status where it fails."""
    words = []
    shown = []
    for part in command:
        word = str(part)
        if word.endswith(".py"):
            word = str(_LAUNCH / word)
        words.append(word)
        if word.startswith(str(_LAUNCH)):
            word = os.path.relpath(word)
        shown.append(word)
    line = " ".join(shown)
    print(f"\n$ {line}", flush=True)
    programs = Path(sys.executable).parent
    others = os.environ.get("PATH", "")
    environment = dict(os.environ)
    environment["PATH"] = f"{programs}{os.pathsep}{others}"
    if shutil.which("nvidia-smi") is None:
        # Else DeepSpeed's launcher warns of it.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    words[0] = str(programs / words[0])
    with StoppableCommands() as commands:
        status = commands.run(words, environment)
    if commands.stopped:
        print("the demo was stopped, as asked", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
