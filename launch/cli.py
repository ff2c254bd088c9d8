"""`syncrec COMMAND …`: what the scripts in this folder do, as one console command of an installed wheel.

    syncrec prepare --input logs/ --output data/shop
    syncrec train --config default data=data/shop run=runs/1
    syncrec evaluate --run runs/1

Many ranks are started by a launcher: `deepspeed launch/train.py …`, or of an installed wheel
`deepspeed --module launch.train …`.
"""

import ast
import runpy
import sys
from pathlib import Path

from trainer import __version__
from trainer.interrupts import end_on_interrupt

COMMANDS = (
    "prepare",
    "doctor",
    "train",
    "trace",
    "evaluate",
    "recommend",
    "export",
    "study",
    "publish",
    "retrain",
    "synthesize",
    "demo",
    "stack",
)


def main() -> None:
    """Runs the script that the first argument names, with the others."""
    end_on_interrupt()
    arguments = sys.argv[1:]
    if arguments in ([], ["--help"], ["-h"]):
        print(overview())
        return
    if arguments == ["--version"]:
        print(f"syncrec {__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        print(
            f"error: there is no command {command!r} (there are: {', '.join(COMMANDS)})",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [f"syncrec {command}", *arguments[1:]]
    runpy.run_module(f"launch.{command}", run_name="__main__")


def overview() -> str:
    """A line for each command: the first line of its script's docstring."""
    lines = ["syncrec COMMAND …; syncrec COMMAND --help says more", ""]
    for command in COMMANDS:
        source = (
            Path(__file__)
            .with_name(f"{command}.py")
            .read_text(encoding="utf-8")
        )
        about = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {command:<11} {about.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
