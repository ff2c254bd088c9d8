"""Any of RecBole's general and sequential models, by name, on a prepared dataset: our split, candidates and rule of choice.

RecBole asks for another NumPy. So it trains in an environment of its own, as a child of this process (recbole_peer.py), by its
own trainer, loader and augmentation of histories. After every epoch the model scores the validation candidates; their ranks by
our rules (handed.py) choose the epoch whose model ranks the test items.

    FOLDER/ranks.parquet   of the test items (trainer/evaluation/user_ranks.py)
    FOLDER/result.json     what run_recbole returns; written last, so that a folder with it is a finished run
    FOLDER/recbole.log     what RecBole said

A sequential model sees the history up to the held-out item: at test with the validation item in it. A general model knows a
user from the training part alone, for validation and for test.
"""

import difflib
import json
import os
import shutil
import subprocess
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.user_ranks import write_ranks
from trainer.files.atomic import move_folder, write_json
from trainer.study.peers.dataset_export import hand_over, write_log
from trainer.study.peers.interface import Handed

RANKS, RESULT, LOG = "ranks.parquet", "result.json", "recbole.log"
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_MAKE = "make it with `make peers`, or name another with --recbole-python"


def default_python() -> Path:
    """The Python of RecBole's environment: $RECBOLE_PYTHON, or what `make peers` makes. It need not be there."""
    return Path(
        os.environ.get("RECBOLE_PYTHON") or _ROOT / ".venv-peers" / "bin" / "python"
    )


def recbole_models(python) -> dict[str, str | None]:
    """RecBole's models in `python`'s environment: {name: None, or one line that says why it cannot be compared}.

    Raises InputError where there is no such environment, or no RecBole in it.
    """
    command = [_absolute(python), str(_HERE / "recbole_models.py")]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        raise InputError(
            f"RecBole's environment: {python} cannot be run ({error.strerror}): {_MAKE}"
        ) from None
    try:
        models = json.loads(done.stdout)["models"] if done.returncode == 0 else None
    except (ValueError, KeyError, TypeError):
        models = None
    if models is None:
        raise InputError(f"RecBole's environment: {python} has no RecBole: {_MAKE}")
    return models


def run_recbole(
    dataset,
    folder,
    model,
    seed,
    python,
    options=None,
    epochs=300,
    patience=10,
    minutes=0,
    say=print,
    *,
    evaluation_seed=0,
    negatives=99,
    given=None,
) -> dict:
    """Trains a model, leaves its test ranks in `folder`, and returns what was found; a finished run is not done again.

    dataset: Dataset. model: RecBole's name, in any case of letters. seed: of RecBole. python: of its environment. options:
    RecBole's settings over its defaults for the model ({"learning_rate": 0.01, "MAX_ITEM_LIST_LENGTH": 64}). epochs: at most.
    patience: epochs without a better validation before training stops, 0: never. minutes: training ends after the first epoch
    over them, 0: no limit. say(line): progress. evaluation_seed, negatives: of the candidates, a run's `seed` and
    `evaluation.negatives`. given: a folder for what RecBole is handed, kept there for other models of the same dataset;
    without it, each run writes its own and removes it.

    Returned, and in result.json: task (the above), model, epochs [{epoch (from 0), seconds (since the start),
    training_seconds (of this epoch), validation}], best_epoch, validation (its mean over domains of NDCG@10), stopped (why),
    seconds (of the training and its validations), users_per_second, samples_per_second (of the training alone), users,
    too_short, weights, recbole (its settings), versions, …

    Raises InputError, one line: no environment, an unknown model (with near names), one that needs what a log does not have,
    an option that RecBole does not know, a folder that holds another run, and a training that fails (RecBole's last line, and
    where the rest is).
    """
    run = _Run(Path(folder).resolve(), say)
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
    }
    task = json.loads(json.dumps(task))  # as it will be read
    if (found := run.finished(task)) is not None:
        say(f"{found['model']}: done already, {run.folder}")
        return found
    task["model"] = model = _known(recbole_models(python), model)
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir(parents=True)
    try:
        say(f"{model}: handing over")
        handed = _handed(dataset, Path(given or run.work / "given").resolve(), task)
        found = run.train(python, handed, task)
        with np.load(run.work / "ranks.npz", allow_pickle=False) as ranks:
            domain_U = handed.domain_of(handed.load("candidates-test")[:, 0])
            write_ranks(
                run.folder / RANKS,
                handed.user_U,
                domain_U,
                ranks["sampled"],
                ranks["full"],
            )
    finally:
        shutil.rmtree(run.work, ignore_errors=True)
    found = {
        "task": task,
        "model": model,
        **found,
        "users": len(handed.user_U),
        "too_short": dataset.too_short,
    }
    write_json(run.folder / RESULT, found)
    best = f"{found['validation']:.4f} in epoch {found['best_epoch'] + 1}"
    say(
        f"{model}: {len(found['epochs'])} epochs in {_time(found['seconds'])} ({found['stopped']}), NDCG@10 {best}"
    )
    if abs(found["validation_again"] - found["validation"]) > 1e-6:
        say(
            f"{model}: scored again, its best epoch has {found['validation_again']:.4f}: it draws as it scores"
        )
    return found


def _absolute(python):
    """The path, from wherever it is run; links stay, which make an environment. Raises InputError where there is none."""
    found = shutil.which(str(python))
    if found is None:
        raise InputError(
            f"RecBole's environment: {python} is no Python that can be run: {_MAKE}"
        )
    return os.path.abspath(found)


def _known(models, model):
    """RecBole's spelling. Raises InputError where it has none, or the model cannot be compared."""
    names = {name.lower(): name for name in models}
    if model.lower() not in names:
        near = [
            names[name] for name in difflib.get_close_matches(model.lower(), names, 3)
        ]
        raise InputError(
            f"RecBole has no model {model}"
            + (f": {' or '.join(near)}?" if near else "")
        )
    name = names[model.lower()]
    if models[name]:
        raise InputError(f"RecBole's {name} cannot be compared here: {models[name]}")
    return name


def _handed(dataset, folder, task) -> Handed:
    """What RecBole reads; written beside and renamed, so that it is there whole or not at all."""
    about = {name: task[name] for name in ("dataset", "evaluation_seed", "negatives")}
    if folder.is_dir():
        try:
            there = json.loads((folder / "about.json").read_text())
        except (OSError, ValueError):
            there = None
        if there != about:
            raise InputError(
                f"{folder}: was handed over of another dataset, seed or number of negatives: take another folder"
            )
        return Handed(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_log(
            hand_over(dataset, partial, task["evaluation_seed"], task["negatives"])
        )
        write_json(partial / "about.json", about)
        try:
            move_folder(partial, folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Handed(folder)


@dataclass(frozen=True)
class _Run:
    folder: Path
    say: object

    @property
    def work(self):
        """Gone when the run is done."""
        return self.folder / "work"

    def finished(self, task):
        """What was found, or None. Raises InputError where the folder holds another run."""
        if not (self.folder / RESULT).is_file():
            return None
        try:
            found = json.loads((self.folder / RESULT).read_text())
            same = {name: found["task"].get(name) == task[name] for name in task}
            same["model"] = found["model"].lower() == task["model"].lower()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{self.folder / RESULT} cannot be read: remove the folder"
            ) from None
        if not all(same.values()):
            another = ", ".join(name for name in task if not same[name])
            raise InputError(
                f"{self.folder}: holds a run with another {another}: take another folder, or remove it"
            )
        return found if (self.folder / RANKS).is_file() else None

    def train(self, python, handed, task):
        """What recbole_peer.py finds; progress is told meanwhile."""
        write_json(self.work / "task.json", task)
        script, log = _HERE / "recbole_peer.py", self.folder / LOG
        command = [
            _absolute(python),
            script,
            handed.folder,
            self.work / "task.json",
            self.work / "ranks.npz",
        ]
        answer = {}
        with open(log, "w") as errors:
            child = subprocess.Popen(
                list(map(str, command)),
                cwd=self.work,  # it leaves folders where it runs
                stdin=subprocess.PIPE,  # the child ends where we do
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                for line in child.stdout:
                    answer = json.loads(line)
                    if "epoch" in answer:
                        self.say(
                            f"{task['model']}: {_progress(answer, task['minutes'])}"
                        )
                status = child.wait()
            finally:
                child.kill()
                child.stdin.close()
                child.stdout.close()
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


def _progress(answer, minutes):
    done, total, best = answer["epoch"] + 1, answer["of"], answer["best"]
    left = answer["seconds"] / done * (total - done)
    if minutes:
        left = min(left, max(0, 60 * minutes - answer["seconds"]))
    first = f"epoch {done} of {total}, validation NDCG@10 {answer['validation']:.4f}"
    return f"{first} (best {best['validation']:.4f}, epoch {best['epoch'] + 1}), at most {_time(left)} left"


def _time(seconds):
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _last_line(log):
    with open(log, errors="replace") as lines:
        last = deque(filter(None, map(str.strip, lines)), maxlen=1)
    return last[0] if last else ""
