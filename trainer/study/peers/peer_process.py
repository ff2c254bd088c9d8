"""What the programs of all peers do alike: they answer in lines of JSON, and stop training early.

    PYTHON trainer/study/peers/NAME_peer.py FOLDER TASK.json RANKS.npz

Runs in a peer's environment, and needs NumPy alone. FOLDER is what dataset_export.py wrote. TASK.json
has model, seed, options (the peer's settings), epochs, patience and minutes, as the bridge takes
them. RANKS.npz gets `sampled` and `full`, int32 (T,), ranks of the test items at the best epoch.
Standard output is a line of JSON for each epoch ({"epoch": …}) and one at the end: {"found": …} or
{"error": one line}. The process ends where standard input does: nobody trains on for a caller that
was killed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from trainer.study.peers.interface import PeerDataset
from trainer.study.peers.peer_scores import PeerScores

Task = dict[str, Any]
Say = Callable[[Any], None]  # writes a JSON value as a line
# (dataset, task, say) to what is known of the run, and ranks.
Train = Callable[
    [PeerDataset, Task, Say],
    tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]],
]


class Refused(Exception):
    """The message is one line for the person who asked."""


class TrainingEnded(Exception):
    """Training ends before its last epoch (early stopping); the message says why."""


def answer(train: Train) -> None:
    """Trains as the command line says, and answers on standard output."""
    folder, task_file, ranks_file = map(Path, sys.argv[1:])
    say = _take_output()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    task = json.loads(task_file.read_text(encoding="utf-8"))
    try:
        found, ranks = train(PeerDataset(folder), task, say)
    except Refused as error:
        say({"error": str(error)})
        return
    np.savez(ranks_file, sampled=ranks[0], full=ranks[1])
    say({"found": found})


class Epochs:
    """Ranks the validation candidates after every epoch, keeps the best model, and stops early."""

    def __init__(
        self,
        scores: PeerScores,
        task: Task,
        total: int,
        say: Say,
    ) -> None:
        """total: epochs at most. Training begins now."""
        self.scores = scores
        self.task = task
        self.total = total
        self.say = say
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # of `records`
        self._process_seconds = _seconds_of_process()
        self._began = time.time()
        self._begun = time.perf_counter()
        self._last = self._begun

    def validate(self) -> float:
        """To be called after an epoch. Raises TrainingEnded."""
        training_seconds = time.perf_counter() - self._last
        validation = self.scores.validation()
        self._last = time.perf_counter()
        epoch = {
            "epoch": len(self.records),
            "seconds": self.seconds(),
            "training_seconds": training_seconds,
            "validation": validation,
        }
        self.records.append(epoch)
        if not self.best or validation > self.best["validation"]:
            self.best = epoch
            self.scores.keep_best()
        self.say(epoch | {"of": self.total, "best": self.best})
        if len(self.records) < self.total:
            self._check_limits(epoch)
        return validation

    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._begun

    def _check_limits(self, epoch: dict[str, Any]) -> None:
        """Ends training by patience or by minutes (early stopping)."""
        without_better = epoch["epoch"] - self.best["epoch"]
        if 0 < self.task["patience"] <= without_better:
            raise TrainingEnded("patience")
        if 0 < self.task["minutes"] <= epoch["seconds"] / 60:
            raise TrainingEnded("limit of minutes")

    def describe(
        self,
        users: int,
        samples: int,
    ) -> dict[str, Any]:
        """What is known of the epochs and of the process. samples: of each epoch.

        began: when training did, in seconds since 1970. start_up_seconds: of the process before.
        memory_bytes: its peak. The last two are None where the system does not say.
        """
        trained = sum(epoch["training_seconds"] for epoch in self.records)
        epochs = len(self.records)
        return {
            "epochs": self.records,
            "best_epoch": self.best["epoch"],
            "validation": self.best["validation"],
            "users_per_second": users * epochs / trained,
            "samples_per_second": samples * epochs / trained,
            "samples_per_epoch": samples,
            "began": self._began,
            "start_up_seconds": self._process_seconds,
            "memory_bytes": _peak_memory(),
        }


def copy_weights(model: Any) -> dict[str, Any]:
    """The weights of a PyTorch module as they are now."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.clone()
    return weights


def versions_of(*packages: str) -> dict[str, str | None]:
    """Of Python and the packages; None for one that is not there."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _seconds_of_process() -> float | None:
    """Since this process began; None where Linux's files do not say."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="utf-8")
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return None
    # Its 22nd field, in clock ticks since the boot; the second is in brackets.
    _, _, fields = text.rpartition(")")
    ticks = int(fields.split()[19])
    return now - ticks / os.sysconf("SC_CLK_TCK")


def _peak_memory() -> int | None:
    """The most that this process held, in bytes; None where Linux's files do not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in lines.splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return None


def _take_output() -> Say:
    """Takes standard output for lines of JSON.

    What a peer prints goes to standard error from now on.
    """
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: Any) -> None:
        # Whatever a peer's settings hold.
        line = json.dumps(value, default=str)
        print(line, file=output, flush=True)

    return say


def _end_with_caller() -> None:
    """Ends the process where standard input does."""
    while os.read(0, 4096):
        pass
    os._exit(1)
