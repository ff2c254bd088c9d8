"""RecBole's side of recbole_bridge.py: trains one model, and ranks with it.

    .venv-peers/bin/python trainer/study/peers/recbole_peer.py FOLDER TASK.json RANKS.npz

Runs in RecBole's environment. FOLDER is what dataset_export.py wrote. TASK.json has model, seed,
options (RecBole's settings), epochs, patience and minutes, as run_recbole takes them. RANKS.npz
gets `sampled` and `full`, int32 (U,), ranks of the test items at the best epoch. Standard output
is a line of JSON for each epoch ({"epoch": …}) and one at the end: {"found": …} or {"error": one
line}. The process ends where standard input does: nobody trains on for a caller that was killed.
"""

import copy
import difflib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside the file, where a module may have the name of one of RecBole's.
# Ours come last: they may lie among the packages of our environment.
sys.path.pop(0)
sys.path.append(str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, get_trainer, init_seed

from trainer.study.peers.interface import PeerDataset
from trainer.study.peers.recbole_scores import Scores

# Options that the comparison stands on, or that run_recbole has parameters for.
RESERVED = {
    "model",
    "dataset",
    "data_path",
    "checkpoint_dir",
    "load_col",
    "eval_args",
    "benchmark_filename",
    "repeatable",
    "seed",
    "epochs",
    "eval_step",
    "stopping_step",
    "valid_metric",
    "metrics",
    "show_progress",
    "USER_ID_FIELD",
    "ITEM_ID_FIELD",
}
# These learn from chosen items alone, though they ask for pairs with labels as those that need
# negatives do.
WITHOUT_NEGATIVES = {"RepeatNet"}
# What differs between hosts, and is not recorded.
_UNRECORDED = {"data_path", "checkpoint_dir", "load_col", "device"}
_PLAIN_TYPES = bool | int | float | str | list | dict | None

Task = dict[str, Any]
Say = Callable[[Any], None]  # writes a JSON value as a line


class Refused(Exception):
    """The message is one line for the person who asked."""


class TrainingEnded(Exception):
    """Training ends before its last epoch (early stopping); the message says why."""


def main() -> None:
    """Answers on standard output."""
    folder, task_file, ranks = map(Path, sys.argv[1:])
    say = _take_output()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    task = json.loads(task_file.read_text(encoding="utf-8"))
    try:
        say({"found": train(PeerDataset(folder), task, ranks, say)})
    except Refused as error:
        say({"error": str(error)})


def train(
    handed: PeerDataset,
    task: Task,
    ranks: Path,
    say: Say,
) -> dict[str, Any]:
    """Trains, writes the ranks, and returns what is known of the run."""
    config = make_config(handed, task)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    loader, _, _ = data_preparation(config, dataset)
    begun = time.perf_counter()
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loader.dataset).to(
        config["device"]
    )
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    scores = Scores(config, dataset, model, handed, task.get("min_users", 1))
    total = min(config["epochs"], trainer.epochs)
    epochs = Epochs(scores, task, total, begun, say)
    trainer._valid_epoch = epochs.validate
    stopped = "all epochs"
    try:
        trainer.fit(
            loader,
            valid_data=[None],
            verbose=False,
            saved=False,
        )
    except TrainingEnded as reason:
        stopped = str(reason)
    seconds = time.perf_counter() - begun
    epochs.restore_best()
    validation_again = scores.validation()
    sampled_U, full_U = scores.test()
    np.savez(
        ranks,
        sampled=sampled_U,
        full=full_U,
    )
    samples = len(loader.dataset.inter_feat)
    return {
        **epochs.describe(len(handed.user_U), samples),
        # Of the model that was ranked with: the same, but for a model that draws as it scores.
        "validation_again": validation_again,
        "stopped": stopped,
        "seconds": seconds,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "family": config["MODEL_TYPE"].name.lower(),
        "device": str(config["device"]),
        "threads": torch.get_num_threads(),
        "recbole": _describe_config(config),
        "versions": _versions(),
    }


def make_config(
    handed: PeerDataset,
    task: Task,
) -> Config:
    """RecBole's Config.

    Raises Refused for an option that RecBole would not heed, or that is not the caller's to choose.
    """
    options = task["options"]
    reserved = sorted(RESERVED & options.keys())
    if reserved:
        raise Refused(
            f"{reserved[0]} is not among RecBole's options that can be chosen here: the "
            "comparison stands on it"
        )
    settings = {
        "data_path": str(handed.folder),
        "load_col": {
            "inter": ["user_id", "item_id", "timestamp"],
            "item": ["item_id"],
        },
        # Nothing is held out: what is was never exported (dataset_export.write_log).
        "eval_args": {
            "split": {"RS": [1.0, 0.0, 0.0]},
            "order": "TO",
            "group_by": "none",
            "mode": "full",
        },
        "seed": task["seed"],
        "epochs": task["epochs"],
        "stopping_step": task["epochs"],  # Epochs stops
        "show_progress": False,
        # Not used; the defaults of some models do not go with a ranking of all items.
        "metrics": ["NDCG"],
        "valid_metric": "NDCG@10",
        "train_neg_sample_args": None,
        **options,
    }
    config = _load_config(task["model"], settings)
    _refuse_unknown(
        options,
        config,
        task["model"],
    )
    if "train_neg_sample_args" not in options and _needs_negatives(config):
        del settings["train_neg_sample_args"]  # its own
        config = _load_config(task["model"], settings)
    return config


def _refuse_unknown(
    options: dict[str, Any],
    config: Config,
    model: str,
) -> None:
    """Raises Refused, with near names, for an option that RecBole does not have."""
    known = set(config.internal_config_dict).union(*config.parameters.values())
    for name in options.keys() - known:
        near = difflib.get_close_matches(
            name,
            known,
            3,
        )
        hint = f" for {model}"
        if near:
            hint = f": {' or '.join(near)}?"
        raise Refused(f"RecBole has no option {name}{hint}")


def _load_config(
    model: str,
    settings: dict[str, Any],
) -> Config:
    """RecBole's Config of settings over its defaults for the model."""
    arguments = sys.argv
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    try:
        config = Config(
            model=model,
            dataset="training",
            config_dict=dict(settings),
        )
    finally:
        sys.argv = arguments
    logging.getLogger().setLevel(logging.WARNING)
    return config


def _needs_negatives(config: Config) -> bool:
    """Whether the model trains with negative sampling."""
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        return True
    if hasattr(config.model_class, "input_type"):
        return config["model"] not in WITHOUT_NEGATIVES
    return config["loss_type"] != "CE"  # over all items: it refuses negatives


class Epochs:
    """Stands where RecBole validates.

    Ranks the validation candidates after every epoch, keeps the best model, and ends training
    (early stopping).
    """

    def __init__(
        self,
        scores: Scores,
        task: Task,
        total: int,
        begun: float,
        say: Say,
    ) -> None:
        """total: epochs at most. begun: by `time.perf_counter`."""
        self.scores = scores
        self.task = task
        self.total = total
        self.begun = begun
        self.say = say
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # of `records`
        self._best_state: dict[str, torch.Tensor] = {}
        self._best_others: Any = None  # what RecBole keeps beside the weights
        self._last = begun

    def validate(
        self,
        valid_data: Any,
        show_progress: bool = False,
    ) -> tuple[float, dict]:
        """For `Trainer._valid_epoch`. Raises TrainingEnded."""
        training_seconds = time.perf_counter() - self._last
        validation = self.scores.validation()
        self._last = time.perf_counter()
        epoch = {
            "epoch": len(self.records),
            "seconds": self._last - self.begun,
            "training_seconds": training_seconds,
            "validation": validation,
        }
        self.records.append(epoch)
        if not self.best or validation > self.best["validation"]:
            self.best = epoch
            self._keep_model()
        self.say(epoch | {"of": self.total, "best": self.best})
        if len(self.records) < self.total:
            self._check_limits(epoch)
        return validation, {}

    def _keep_model(self) -> None:
        """Copies the weights of the best epoch."""
        model = self.scores.model
        self._best_state = {}
        for name, tensor in model.state_dict().items():
            self._best_state[name] = tensor.clone()
        self._best_others = copy.deepcopy(model.other_parameter())

    def _check_limits(self, epoch: dict[str, Any]) -> None:
        """Ends training by patience or by minutes (early stopping)."""
        without_better = epoch["epoch"] - self.best["epoch"]
        if 0 < self.task["patience"] <= without_better:
            raise TrainingEnded("patience")
        if 0 < self.task["minutes"] <= epoch["seconds"] / 60:
            raise TrainingEnded("limit of minutes")

    def restore_best(self) -> None:
        """Puts the model back to its best epoch, as RecBole's own evaluation does."""
        self.scores.model.load_state_dict(self._best_state)
        self.scores.model.load_other_parameter(self._best_others)

    def describe(
        self,
        users: int,
        samples: int,
    ) -> dict[str, Any]:
        """What is known of the epochs. samples: of each."""
        trained = sum(epoch["training_seconds"] for epoch in self.records)
        epochs = len(self.records)
        return {
            "epochs": self.records,
            "best_epoch": self.best["epoch"],
            "validation": self.best["validation"],
            "users_per_second": users * epochs / trained,
            "samples_per_second": samples * epochs / trained,
            "samples_per_epoch": samples,
        }


def _describe_config(config: Config) -> dict[str, Any]:
    """RecBole's configuration for a record: of the model and its training, and what was changed.

    Values that JSON does not have are left out.
    """
    names = {
        *config.internal_config_dict,
        *config.external_config_dict,
    } - _UNRECORDED
    values = {}
    for name in sorted(names):
        if name not in config.final_config_dict:
            continue
        value = config.final_config_dict[name]
        if isinstance(value, _PLAIN_TYPES):
            values[name] = value
    return values


def _versions() -> dict[str, str | None]:
    """Of Python and the packages; None for one that is not there."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in ("recbole", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _take_output() -> Say:
    """Takes standard output for lines of JSON.

    What RecBole prints goes to standard error from now on.
    """
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: Any) -> None:
        # Whatever RecBole's settings hold.
        line = json.dumps(value, default=str)
        print(line, file=output, flush=True)

    return say


def _end_with_caller() -> None:
    """Ends the process where standard input does."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
