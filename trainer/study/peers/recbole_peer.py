"""RecBole's side of recbole_bridge.py: trains one model, and ranks with it. Runs in RecBole's environment.

    .venv-peers/bin/python trainer/study/peers/recbole_peer.py FOLDER TASK.json RANKS.npz

FOLDER is what hand_over.py wrote. TASK.json: model, seed, options (RecBole's settings), epochs, patience, minutes, as
run_recbole has them. RANKS.npz: `sampled` and `full`, int32 (U,), ranks of the test items at the best epoch. Standard output is
a line of JSON for each epoch ({"epoch": …}) and one at the end: {"found": …} or {"error": one line}. It ends where standard
input does, so that nobody trains on for a caller that was killed.
"""

import copy
import difflib
import json
import logging
import os
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Run as a file, Python looks beside the file, where a module may have the name of one of RecBole's. Ours come last: they may
# lie among the packages of our environment.
sys.path.pop(0)
sys.path.append(str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, get_trainer, init_seed

from trainer.study.peers.interface import Handed
from trainer.study.peers.recbole_scores import Scores

# What the comparison stands on, or what the caller says otherwise.
RESERVED = {
    *(
        "model",
        "dataset",
        "data_path",
        "checkpoint_dir",
        "load_col",
        "eval_args",
        "benchmark_filename",
        "repeatable",
        "seed",
    ),
    *(
        "epochs",
        "eval_step",
        "stopping_step",
        "valid_metric",
        "metrics",
        "show_progress",
        "USER_ID_FIELD",
        "ITEM_ID_FIELD",
    ),
}
# Learn from what was chosen alone, though they ask for pairs with labels as those that need negatives do.
WITHOUT_NEGATIVES = {"RepeatNet"}


class Refused(Exception):
    """The message is one line for the person who asked."""


class Enough(Exception):
    """Training ends before its last epoch; the message says why."""


def main():
    given, task, ranks = map(Path, sys.argv[1:])
    say = _own_output()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    try:
        say({"found": train(Handed(given), json.loads(task.read_text()), ranks, say)})
    except Refused as error:
        say({"error": str(error)})


def train(handed, task, ranks, say):
    """Trains, writes the ranks, and gives what is known of the run."""
    config = configuration(handed, task)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    loader, _, _ = data_preparation(config, dataset)
    begun = time.perf_counter()
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loader.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    epochs = Epochs(
        Scores(config, dataset, model, handed),
        task,
        min(config["epochs"], trainer.epochs),
        begun,
        say,
    )
    trainer._valid_epoch = epochs.validate
    stopped = "all epochs"
    try:
        trainer.fit(loader, valid_data=[None], verbose=False, saved=False)
    except Enough as reason:
        stopped = str(reason)
    seconds = time.perf_counter() - begun
    epochs.go_back()
    again = epochs.scores.validation()
    sampled_U, full_U = epochs.scores.test()
    np.savez(ranks, sampled=sampled_U, full=full_U)
    trained = sum(epoch["training_seconds"] for epoch in epochs.found)
    samples = len(loader.dataset.inter_feat)
    return {
        "epochs": epochs.found,
        "best_epoch": epochs.best["epoch"],
        "validation": epochs.best["validation"],
        "validation_again": again,  # of the model that was ranked with: the same, but for a model that draws as it scores
        "stopped": stopped,
        "seconds": seconds,
        "users_per_second": len(handed.user_U) * len(epochs.found) / trained,
        "samples_per_second": samples * len(epochs.found) / trained,
        "samples_per_epoch": samples,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "family": config["MODEL_TYPE"].name.lower(),
        "device": str(config["device"]),
        "threads": torch.get_num_threads(),
        "recbole": _plain(config),
        "versions": {"python": sys.version.split()[0]}
        | {name: _version(name) for name in ("recbole", "torch", "numpy")},
    }


def configuration(handed, task):
    """RecBole's Config. Raises Refused for an option that RecBole would not heed, or that is not the caller's to choose."""
    options = task["options"]
    if reserved := sorted(RESERVED & options.keys()):
        raise Refused(
            f"{reserved[0]} is not among RecBole's options that can be chosen here: the comparison stands on it"
        )
    settings = {
        "data_path": str(handed.folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
        # Nothing is held out: what is was never handed over. Its own split is of prefixes, see hand_over.write_log.
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
        "metrics": [
            "NDCG"
        ],  # not asked for; the defaults of some models do not go with a ranking of all items
        "valid_metric": "NDCG@10",
        "train_neg_sample_args": None,
        **options,
    }
    config = _config(task["model"], settings)
    known = set(config.internal_config_dict).union(*config.parameters.values())
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, 3)
        raise Refused(
            f"RecBole has no option {name}"
            + (f": {' or '.join(near)}?" if near else f" for {task['model']}")
        )
    if "train_neg_sample_args" not in options and _needs_negatives(config):
        del settings["train_neg_sample_args"]  # its own
        config = _config(task["model"], settings)
    return config


def _config(model, settings):
    arguments, sys.argv = sys.argv, sys.argv[:1]  # it reads the command line too
    try:
        config = Config(model=model, dataset="training", config_dict=dict(settings))
    finally:
        sys.argv = arguments
    logging.getLogger().setLevel(logging.WARNING)
    return config


def _needs_negatives(config):
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        return True
    if hasattr(config.model_class, "input_type"):
        return config["model"] not in WITHOUT_NEGATIVES
    return config["loss_type"] != "CE"  # over all items: it refuses negatives


class Epochs:
    """Stands where RecBole validates: ranks the validation candidates after every epoch, keeps the best model, says when it is
    enough."""

    def __init__(self, scores, task, total, begun, say):
        self.scores, self.task, self.total, self.begun, self.say = (
            scores,
            task,
            total,
            begun,
            say,
        )
        self.found, self.best, self._kept, self._last = [], None, None, begun

    def validate(self, valid_data, show_progress=False):
        """For `Trainer._valid_epoch`."""
        training = time.perf_counter() - self._last
        value = self.scores.validation()
        self._last = time.perf_counter()
        epoch = {
            "epoch": len(self.found),
            "seconds": self._last - self.begun,
            "training_seconds": training,
        }
        epoch["validation"] = value
        self.found.append(epoch)
        if self.best is None or value > self.best["validation"]:
            self.best = epoch
            weights = {
                name: tensor.clone()
                for name, tensor in self._model.state_dict().items()
            }
            self._kept = weights, copy.deepcopy(self._model.other_parameter())
        self.say(epoch | {"of": self.total, "best": self.best})
        if len(self.found) == self.total:
            return value, {}
        if 0 < self.task["patience"] <= epoch["epoch"] - self.best["epoch"]:
            raise Enough("patience")
        if 0 < self.task["minutes"] <= epoch["seconds"] / 60:
            raise Enough("limit of minutes")
        return value, {}

    def go_back(self):
        """Puts the model back to its best epoch, as RecBole's own evaluation does."""
        weights, others = self._kept
        self._model.load_state_dict(weights)
        self._model.load_other_parameter(others)

    @property
    def _model(self):
        return self.scores.model


def _plain(config):
    """What a record says of RecBole's configuration: what its files say of the model and its training, and what was changed."""
    names = {*config.internal_config_dict, *config.external_config_dict} - {
        "data_path",
        "checkpoint_dir",
        "load_col",
        "device",
    }
    values = {
        name: config.final_config_dict[name]
        for name in sorted(names)
        if name in config.final_config_dict
    }
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, bool | int | float | str | list | dict | None)
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_output():
    """Writes a value to standard output as a line of JSON; what RecBole prints goes to standard error from now on."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value):
        print(
            json.dumps(value, default=str), file=own, flush=True
        )  # whatever RecBole's settings hold

    return say


def _end_with_caller():
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
