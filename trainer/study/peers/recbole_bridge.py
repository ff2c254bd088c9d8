"""Trains RecBole's general and sequential models as baselines, by our split, candidates and choice.

RecBole asks for another NumPy. So it trains in an environment of its own, as a child of this
process (recbole_peer.py), by its own trainer, loader and augmentation of histories. After every
epoch the model scores the validation candidates. Their ranks by our rules (interface.py) choose
the epoch whose model ranks the test items.

    FOLDER/ranks.parquet   of the test items (trainer/evaluation/user_ranks.py)
    FOLDER/result.json     what run_recbole returns; written last: a folder with it is finished
    FOLDER/recbole.log     RecBole's output

A sequential model sees the history up to the held-out item: at test with the validation item in
it. A general model knows a user from the training part alone, for validation and for test.
"""

import difflib
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
from trainer.errors import InputError
from trainer.evaluation.user_ranks import UserRanks, write_ranks
from trainer.files.atomic import write_json
from trainer.files.staged import staged_folder
from trainer.study.peers.dataset_export import export_dataset, write_log
from trainer.study.peers.interface import PeerDataset

RANKS = "ranks.parquet"
RESULT = "result.json"
LOG = "recbole.log"
_PEERS = Path(__file__).resolve().parent
_ROOT = Path(__file__).resolve().parents[3]
_MAKE = "make it with `make peers`, or name another with --recbole-python"

Task = dict[str, Any]  # what recbole_peer.py is to train
Result = dict[str, Any]  # what result.json says


def default_python() -> Path:
    """The Python of RecBole's environment: $RECBOLE_PYTHON, or what `make peers` makes.

    It need not be there.
    """
    named = os.environ.get("RECBOLE_PYTHON")
    if named:
        return Path(named)
    return _ROOT / ".venv-peers" / "bin" / "python"


def recbole_models(python: str | Path) -> dict[str, str | None]:
    """RecBole's models in `python`'s environment: {name: None, or why it cannot be compared}.

    Raises InputError where there is no such environment, or no RecBole in it.
    """
    command = [_executable(python), str(_PEERS / "recbole_models.py")]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise InputError(
            f"RecBole's environment: {python} cannot be run ({error.strerror}): {_MAKE}"
        ) from None
    models = None
    if done.returncode == 0:
        try:
            models = json.loads(done.stdout)["models"]
        except (ValueError, KeyError, TypeError):
            models = None
    if models is None:
        raise InputError(
            f"RecBole's environment: {python} has no RecBole: {_MAKE}"
        )
    return models


def run_recbole(
    dataset: Dataset,
    folder: str | Path,
    model: str,
    seed: int,
    python: str | Path,
    options: dict[str, Any] | None = None,
    epochs: int = 300,
    patience: int = 10,
    minutes: float = 0,
    say: Callable[[str], None] = print,
    *,
    evaluation_seed: int = 0,
    negatives: int = 99,
    min_users: int = 1,
    given: str | Path | None = None,
) -> Result:
    """Trains a model, leaves its test ranks in `folder`, and returns its result.

    A finished run is not done again. model: RecBole's name, in any case of letters. seed: of
    RecBole. python: of its environment. options: RecBole's settings over its defaults for the
    model ({"learning_rate": 0.01, "MAX_ITEM_LIST_LENGTH": 64}). epochs: at most. patience: epochs
    without a better validation before training stops (early stopping), 0: never. minutes: training
    ends after the first epoch over them, 0: no limit. say: gets lines of progress.
    evaluation_seed, negatives: of the candidates, a run's `seed` and `evaluation.negatives`.
    min_users: of a domain that counts in the validation's mean, a run's `evaluation.min_users`.
    given: a folder for the exported dataset, kept for other models of the same dataset; without
    it, each run exports its own and removes it.

    Returned, and in result.json: task (the above), model, epochs [{epoch (from 0), seconds (since
    the start), training_seconds (of this epoch), validation}], best_epoch, validation (its mean
    over domains of NDCG@10), stopped (why), seconds (of the training and its validations),
    users_per_second, samples_per_second (of the training alone), users, too_short, weights,
    recbole (its settings), versions, …

    Raises InputError, one line: no environment, an unknown model (with near names), one that needs
    what a log does not have, an option that RecBole does not know, a folder that holds another
    run, and a training that fails (RecBole's last line, and where the rest is).
    """
    task = {
        "dataset": dataset.fingerprint,
        "model": model,
        "seed": seed,
        "options": options or {},
        "epochs": epochs,
        "patience": patience,
        "minutes": minutes,
        "evaluation_seed": evaluation_seed,
        "negatives": negatives,
        "min_users": min_users,
    }
    task = json.loads(json.dumps(task))  # as it will be read
    run = _Run(Path(folder).resolve(), say)
    return run.finish(
        dataset,
        task,
        python,
        given,
    )


def _executable(python: str | Path) -> str:
    """The path, from wherever it is run; links stay, which make an environment.

    Raises InputError where there is none.
    """
    path = shutil.which(str(python))
    if path is None:
        raise InputError(
            f"RecBole's environment: {python} is no Python that can be run: {_MAKE}"
        )
    return os.path.abspath(path)


def _spell(
    model: str,
    models: dict[str, str | None],
) -> str:
    """RecBole's spelling. Raises InputError where it has none, or it cannot be compared."""
    names = {name.lower(): name for name in models}
    if model.lower() not in names:
        near = difflib.get_close_matches(
            model.lower(),
            names,
            3,
        )
        hint = ""
        if near:
            hint = f": {' or '.join(names[name] for name in near)}?"
        raise InputError(f"RecBole has no model {model}{hint}")
    name = names[model.lower()]
    if models[name]:
        raise InputError(
            f"RecBole's {name} cannot be compared here: {models[name]}"
        )
    return name


def _export_dataset(
    dataset: Dataset,
    folder: Path,
    task: Task,
) -> PeerDataset:
    """Writes what RecBole reads, all of it or nothing."""
    made_from = {}
    for name in ("dataset", "evaluation_seed", "negatives"):
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
        model = _spell(task["model"], recbole_models(python))
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
        """What recbole_peer.py answers; says its progress meanwhile."""
        write_json(self.work / "task.json", task)
        log = self.folder / LOG
        command = [
            _executable(python),
            _PEERS / "recbole_peer.py",
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
                f"RecBole's {task['model']} failed ({how}): {last} (more in {log})"
            )
        return answer["found"]

    def _write_ranks(self, handed: PeerDataset) -> None:
        """The test ranks that recbole_peer.py has left, by user."""
        test_U = handed.load("candidates-test")[:, 0]
        with np.load(self.work / "ranks.npz", allow_pickle=False) as ranks:
            user_ranks = UserRanks(
                handed.user_U,
                handed.domain_of(test_U),
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
