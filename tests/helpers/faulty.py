"""Started with real ranks: launch/train.py, in which something goes wrong once, in the middle of a step.

FAULT="STEP RANK WHAT FILE" says what: at STEP (counted from 1) of the run, on RANK: a signal's name (KILL, TERM, USR1; sent
to itself), "ctrl-c" (SIGINT to all processes of its group), "nan" (the gradient is no number), "raise" (an exception of
Python's), "hang", or "wait" (until FILE.go is there). FILE is made when it happens; where it is there already nothing happens.
Several faults stand one after the other, with a ; between them. FED=FOLDER: each rank appends to a file there whom it was fed
in which step.
"""

import json
import os
import signal
import time
from pathlib import Path

import launch.train
from trainer.distributed.process_exit import run_script
from trainer.training.callbacks import StepLog
from trainer.training.step import Trainer


def with_fault(step, rank, what, file):
    """The trainer's check of the gradients, with the fault before it."""
    check = Trainer._guard_gradient

    def checked(self, gradient, *others):
        if (str(self.step + 1), str(self.ranks.rank)) == (
            step,
            rank,
        ) and not Path(file).exists():
            Path(file).touch()
            if what == "raise":
                raise ZeroDivisionError("by the test")
            if what == "hang":
                time.sleep(3600)
            if what == "wait":
                while not Path(f"{file}.go").exists():
                    time.sleep(0.01)
                return check(self, gradient, *others)
            if what == "ctrl-c":
                os.killpg(0, signal.SIGINT)
                return check(self, gradient, *others)
            if what == "nan":
                gradient.fill_(float("nan"))
            else:
                os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        return check(self, gradient, *others)

    Trainer._guard_gradient = checked


def with_count(folder):
    """The run's own step, which writes down whom it was fed."""
    on_step = StepLog.on_step

    def noted(self, state, report):
        ranks = self._context.ranks
        record = {
            "step": state.step,
            "ranks": ranks.world_size,
            "users": report.rank_batch.users_B.tolist(),
        }
        with open(Path(folder) / f"{ranks.rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        return on_step(self, state, report)

    StepLog.on_step = noted


if __name__ == "__main__":
    if "FAULT" in os.environ:
        for fault in os.environ["FAULT"].split(";"):
            with_fault(*fault.split())
    if "FED" in os.environ:
        with_count(os.environ["FED"])
    run_script(launch.train.main)
