"""Trains a peer's model as a child of this process, by our split, candidates and choice of the epoch.

A peer asks for other packages than ours. So it trains in an environment of its own, by its own
trainer and loader (peer_process.py). After every epoch the model scores the validation candidates.
Their ranks by our rules (interface.py) choose the epoch whose model ranks the test items.

    FOLDER/ranks.parquet   of the test items (trainer/evaluation/user_ranks.py)
    FOLDER/result.json     what run_peer returns; written last: a folder with it is finished
    FOLDER/PEER.log        the peer's output, as recbole.log

A sequential model sees the history up to the held-out item: at test with the validation item in
it. A general model knows a user from the training part alone, for validation and for test.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from trainer.data.format.dataset import Dataset
from trainer.data.loading.timeline import describe_split
from trainer.errors import InputError
from trainer.evaluation.user_ranks import UserRanks, write_ranks
from trainer.files.atomic import write_json
from trainer.files.staged import staged_folder
from trainer.study.peers.dataset_export import export_dataset, write_log
from trainer.study.peers.interface import PeerDataset

RANKS = "ranks.parquet"
RESULT = "result.json"
PEERS = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[3]

Task = dict[str, Any]  # what the peer is to train
Result = dict[str, Any]  # what result.json says


@dataclass(frozen=True)
class Peer:
    """A peer: how it is called in messages, its program, and its models.

    way_out: how its environment is made. spell(python, model): the peer's spelling of a model;
    raises InputError where it has none.
    """

    name: str
    program: Path
    way_out: str
    spell: Callable[[str | Path, str], str]

    @property
    def log(self) -> str:
        """The name of the file that gets its output."""
        return f"{self.name.lower()}.log"


def run_peer(
    peer: Peer,
    dataset: Dataset,
    folder: str | Path,
    python: str | Path,
    task: Task,
    say: Callable[[str], None] = print,
    given: str | Path | None = None,
) -> Result:
    """Trains a model, leaves its test ranks in `folder`, and returns its result.

    A finished run is not done again. python: of the peer's environment. task: model (the peer's
    name, in any case of letters), seed, options (the peer's settings), epochs (at most), patience
    (epochs without a better validation before training stops, 0: never), minutes (training ends
    after the first epoch over them, 0: no limit), evaluation_seed and negatives (of the candidates,
    a run's `seed` and `evaluation.negatives`), min_users (`evaluation.min_users`). say: gets lines
    of progress. given: a folder for the exported dataset, kept for other models of the same
    dataset; without it, each run exports its own and removes it.

    Returned, and in result.json: task, model, epochs [{epoch (from 0), seconds (since training
    began), training_seconds (of this epoch), validation}], best_epoch, validation (its mean over
    domains of NDCG@10), stopped (why), seconds (of the training and its validations),
    began (when training did, since 1970), start_up_seconds (of the process before), memory_bytes
    (its peak), users_per_second, samples_per_second (of the training alone), users, too_short, weights, versions, …

    Raises InputError, one line: no environment, an unknown model, a folder that holds another run,
    what the peer refuses, and a training that fails (its last line, and where the rest is).
    """
    task = {"dataset": dataset.fingerprint, **task}
    split = describe_split(dataset)
    if split is not None:
        task["split"] = split
    task = json.loads(json.dumps(task))  # as it will be read
    run = _Run(peer, Path(folder).resolve(), say)
    return run.finish(
        dataset,
        task,
        python,
        given,
    )


def environment_python(variable: str, folder: str) -> Path:
    """The Python of a peer's environment: what a variable names, or what `make peers` makes.

    It need not be there. folder: of the environment, beside the project's own.
    """
    named = os.environ.get(variable)
    if named:
        return Path(named)
    return ROOT / folder / "bin" / "python"


def executable(peer: str, python: str | Path, way_out: str) -> str:
    """The path, from wherever it is run; links stay, which make an environment.

    Raises InputError where there is none.
    """
    path = shutil.which(str(python))
    if path is None:
        raise InputError(
            f"{peer}'s environment: {python} is no Python that can be run: {way_out}"
        )
    return os.path.abspath(path)


def _export_dataset(
    dataset: Dataset,
    folder: Path,
    task: Task,
) -> PeerDataset:
    """Writes what peers read, all of it or nothing."""
    made_from: dict[str, Any] = {}
    for name in ("dataset", "evaluation_seed", "negatives", "split"):
        if name in task:
            made_from[name] = task[name]
    if folder.is_dir():
        _check_exported(folder, made_from)
        return PeerDataset(folder)
    try:
        with staged_folder(folder, str(os.getpid())) as partial:
            handed = export_dataset(
                dataset,
                partial,
                task["evaluation_seed"],
                task["negatives"],
            )
            write_log(handed)
            write_json(partial / "about.json", made_from)
    except OSError:  # another run was faster
        if not folder.is_dir():
            raise
    return PeerDataset(folder)


def _check_exported(
    folder: Path,
    made_from: dict[str, Any],
) -> None:
    """Raises InputError unless the folder holds what would be exported now."""
    try:
        before = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != made_from:
        raise InputError(
            f"{folder}: was handed over of another dataset, seed or number of negatives: "
            "take another folder"
        )


@dataclass(frozen=True)
class _Run:
    """A run's folder; say: gets lines of progress."""

    peer: Peer
    folder: Path
    say: Callable[[str], None]

    @property
    def work(self) -> Path:
        """Gone when the run is done."""
        return self.folder / "work"

    def finish(
        self,
        dataset: Dataset,
        task: Task,
        python: str | Path,
        given: str | Path | None,
    ) -> Result:
        """The result; trains unless the folder has it."""
        result = self._read_finished(task)
        if result is not None:
            self.say(f"{result['model']}: done already, {self.folder}")
            return result
        model = self.peer.spell(python, task["model"])
        task["model"] = model
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        try:
            self.say(f"{model}: handing over")
            exported = Path(given or self.work / "given").resolve()
            handed = _export_dataset(dataset, exported, task)
            trained = self._train(python, handed, task)
            self._write_ranks(handed)
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        result = {
            "task": task,
            "model": model,
            **trained,
            "users": len(handed.user_U),
            "too_short": dataset.too_short,
        }
        write_json(self.folder / RESULT, result)
        self._summarise(result)
        return result

    def _read_finished(self, task: Task) -> Result | None:
        """The result of a finished run. Raises InputError where the folder holds another run."""
        if not (self.folder / RESULT).is_file():
            return None
        different = []
        try:
            result = json.loads(
                (self.folder / RESULT).read_text(encoding="utf-8")
            )
            for name in task:
                before = result["task"].get(name)
                same = before == task[name]
                if name == "min_users" and before is None:
                    same = True  # a run of before: every domain counted
                if name == "model":
                    same = result["model"].lower() == task["model"].lower()
                if not same:
                    different.append(name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{self.folder / RESULT} cannot be read: remove the folder"
            ) from None
        if different:
            raise InputError(
                f"{self.folder}: holds a run with another {', '.join(different)}: take "
                "another folder, or remove it"
            )
        return result if (self.folder / RANKS).is_file() else None

    def _train(
        self,
        python: str | Path,
        handed: PeerDataset,
        task: Task,
    ) -> Result:
        """What the peer's program answers; says its progress meanwhile."""
        write_json(self.work / "task.json", task)
        log = self.folder / self.peer.log
        command = [
            executable(self.peer.name, python, self.peer.way_out),
            self.peer.program,
            handed.folder,
            self.work / "task.json",
            self.work / "ranks.npz",
        ]
        answer: Result = {}
        with open(log, "w", encoding="utf-8") as errors:
            child = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.work,  # it leaves folders where it runs
                stdin=subprocess.PIPE,  # the child ends where we do
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
            )
            # Both are pipes.
            child_input = cast(IO[str], child.stdin)
            child_output = cast(IO[str], child.stdout)
            try:
                for line in child_output:
                    answer = json.loads(line)
                    if "epoch" in answer:
                        progress = _progress(answer, task["minutes"])
                        self.say(f"{task['model']}: {progress}")
                status = child.wait()
            finally:
                child.kill()
                child_input.close()
                child_output.close()
                child.wait()
        if "error" in answer:
            raise InputError(answer["error"])
        if status or "found" not in answer:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            last = _last_line(log) or "it said nothing"
            raise InputError(
                f"{self.peer.name}'s {task['model']} failed ({how}): {last} (more in {log})"
            )
        return answer["found"]

    def _write_ranks(self, handed: PeerDataset) -> None:
        """The test ranks that the peer has left, by target."""
        user_T, _ = handed.targets("test")
        test_T = handed.load("candidates-test")[:, 0]
        with np.load(self.work / "ranks.npz", allow_pickle=False) as ranks:
            user_ranks = UserRanks(
                handed.user_U[user_T],
                handed.domain_of(test_T),
                ranks["sampled"],
                ranks["full"],
            )
            write_ranks(self.folder / RANKS, user_ranks)

    def _summarise(self, result: Result) -> None:
        """Says how a run has ended."""
        model = result["model"]
        epochs = len(result["epochs"])
        seconds = _time(result["seconds"])
        validation = result["validation"]
        self.say(
            f"{model}: {epochs} epochs in {seconds} ({result['stopped']}), NDCG@10 "
            f"{validation:.4f} in epoch {result['best_epoch'] + 1}"
        )
        again = result["validation_again"]
        if abs(again - validation) > 1e-6:
            self.say(
                f"{model}: scored again, its best epoch has {again:.4f}: it draws as it "
                "scores"
            )


def _progress(
    answer: Result,
    minutes: float,
) -> str:
    """An epoch in words, with the time left at most."""
    done = answer["epoch"] + 1
    total = answer["of"]
    best = answer["best"]
    left = answer["seconds"] / done * (total - done)
    if minutes:
        left = min(left, max(0, 60 * minutes - answer["seconds"]))
    return (
        f"epoch {done} of {total}, validation NDCG@10 {answer['validation']:.4f} "
        f"(best {best['validation']:.4f}, epoch {best['epoch'] + 1}), at most "
        f"{_time(left)} left"
    )


def _time(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _last_line(log: Path) -> str:
    """The last line that is not empty, or ""."""
    last = ""
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            last = line.strip() or last
    return last
