"""RecBole's side of recbole_bridge.py: trains one model, and ranks with it.

    .venv-peers/bin/python trainer/study/peers/recbole_peer.py FOLDER TASK.json RANKS.npz

Runs in RecBole's environment. peer_process.py says what it reads, writes and prints.
"""

import difflib
import logging
import sys
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
from trainer.study.peers.peer_process import (
    Epochs,
    Refused,
    Say,
    Task,
    TrainingEnded,
    answer,
    versions_of,
)
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


def main() -> None:
    """Answers on standard output."""
    answer(train)


def train(
    handed: PeerDataset,
    task: Task,
    say: Say,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Trains; returns what is known of the run, and the ranks of the test items."""
    config = make_config(handed, task)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    loader, _, _ = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loader.dataset).to(
        config["device"]
    )
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    scores = Scores(config, dataset, model, handed, task.get("min_users", 1))
    total = min(config["epochs"], trainer.epochs)
    epochs = Epochs(scores, task, total, say)
    # Where RecBole validates.
    trainer._valid_epoch = lambda *given, **named: (epochs.validate(), {})
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
    seconds = epochs.seconds()
    scores.restore_best()
    validation_again = scores.validation()
    ranks = scores.test()
    samples = len(loader.dataset.inter_feat)
    found = {
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
        "versions": versions_of("recbole", "torch", "numpy"),
    }
    return found, ranks


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


if __name__ == "__main__":
    main()
