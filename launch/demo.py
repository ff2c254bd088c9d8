"""The whole way on synthetic logs: write them, prepare them, train on two ranks, evaluate.

python launch/demo.py --output DIR
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    """Runs what a person would type, and shows it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="a folder; what an earlier demo left in it is replaced",
    )
    output = parser.parse_args().output
    logs, data, run = output / "logs", output / "data", output / "run"
    for folder in (logs, data, run):
        shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    _run(
        [
            "python",
            "synthesize.py",
            "--output",
            logs,
            "--users",
            6000,
            "--items",
            4000,
            "--domains",
            4,
            "--mean-length",
            40,
        ]
    )
    _run(["python", "prepare.py", "--input", logs, "--output", data])
    _run(
        [
            "deepspeed",
            "--num_gpus",
            2,
            "train.py",
            "--config",
            HERE / "configs/demo.yaml",
            f"data={data}",
            f"run={run}",
        ]
    )
    _run(["deepspeed", "--num_gpus", 2, "evaluate.py", "--run", run])
    print(
        f"\nOpen {run / 'report.html'} in a browser: λ and φ by domain, losses, metrics."
    )


def _run(command):
    words = [
        str(HERE / word) if str(word).endswith(".py") else str(word) for word in command
    ]
    print(
        "\n$ "
        + " ".join(
            os.path.relpath(word) if word.startswith(str(HERE)) else word
            for word in words
        ),
        flush=True,
    )
    program = Path(sys.executable).with_name(words[0])
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    finished = subprocess.run([program, *words[1:]], env=os.environ | {"PATH": path})
    if finished.returncode:
        sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
