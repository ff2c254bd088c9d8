"""RecTools' side of rectools_bridge.py: trains its SASRec, and ranks with it.

    .venv-rectools/bin/python trainer/study/peers/rectools_peer.py FOLDER TASK.json RANKS.npz

Runs in RecTools' environment. peer_process.py says what it reads, writes and prints. The options of a
task are flat parameters of RecTools' SASRecModel: {"n_factors": 64, "transformer_layers_type":
"rectools.models.nn.transformers.ligr.LiGRLayers"}.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside the file, where a module may have the name of one of RecTools'.
# Ours come last: they may lie among the packages of our environment.
sys.path.pop(0)
sys.path.append(str(Path(__file__).resolve().parents[3]))

import numpy as np
import pandas as pd
import pydantic
import pytorch_lightning
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

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
from trainer.study.peers.rectools_scores import Scores

# Options that the comparison stands on, or that a task has names for.
RESERVED = {
    "cls",
    "epochs",
    "get_trainer_func",
    "get_val_mask_func",
    "verbose",
}
_DAY = pd.Timestamp("2000-01-01")


def main() -> None:
    """Answers on standard output."""
    answer(train)


def train(
    handed: PeerDataset,
    task: Task,
    say: Say,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Trains; returns what is known of the run, and the ranks of the test items."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pytorch_lightning.seed_everything(task["seed"], verbose=False)
    after_epoch = AfterEpoch(handed, task, say)
    model = make_model(task, after_epoch)
    model.fit(make_dataset(handed))
    epochs = after_epoch.epochs
    seconds = after_epoch.seconds
    epochs.scores.restore_best()
    validation_again = epochs.scores.validation()
    ranks = epochs.scores.test()
    network = model.torch_model
    found = {
        **epochs.describe(
            len(handed.user_U),
            count_samples(handed, model.session_max_len),
        ),
        "validation_again": validation_again,
        "stopped": after_epoch.stopped,
        "seconds": seconds,
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "rectools": model.get_params(simple_types=True),
        "versions": versions_of(
            "rectools", "pytorch-lightning", "torch", "numpy"
        ),
    }
    return found, ranks


def make_model(task: Task, after_epoch: "AfterEpoch") -> SASRecModel:
    """RecTools' model of a task, which calls `after_epoch`.

    Raises Refused for an option that RecTools does not take, or that is not the caller's to choose.
    """
    options = task["options"]
    reserved = sorted(RESERVED & options.keys())
    if reserved:
        raise Refused(
            f"{reserved[0]} is not among RecTools' options that can be chosen here: the "
            "comparison stands on it"
        )

    def make_trainer() -> pytorch_lightning.Trainer:
        return pytorch_lightning.Trainer(
            max_epochs=task["epochs"],
            callbacks=[after_epoch],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    parameters = {**options, "get_trainer_func": make_trainer}
    try:
        return SASRecModel.from_params(parameters)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise Refused(
            f"RecTools does not take {name}: {first['msg']}"
        ) from None


def make_dataset(handed: PeerDataset) -> Dataset:
    """The training part. A day for each place in a history: RecTools sorts by it."""
    user_E, place_E = handed.training_places()
    step_E = place_E - handed.starts_U[user_E]
    interactions = pd.DataFrame(
        {
            Columns.User: user_E,
            Columns.Item: handed.items_N[place_E],
            Columns.Weight: 1.0,
            Columns.Datetime: _DAY + pd.to_timedelta(step_E, "D"),
        }
    )
    return Dataset.construct(interactions)


def count_samples(handed: PeerDataset, longest: int) -> int:
    """Interactions that an epoch predicts: each but a user's first, of the newest ones."""
    predicted_U = np.minimum(handed.training_U - 1, longest)
    return int(np.maximum(predicted_U, 0).sum())


class AfterEpoch(pytorch_lightning.Callback):
    """Validates after every epoch, and ends training (early stopping)."""

    epochs: Epochs

    def __init__(self, handed: PeerDataset, task: Task, say: Say) -> None:
        super().__init__()
        self.handed = handed
        self.task = task
        self.say = say
        self.stopped = "all epochs"
        self.seconds = 0.0  # of the training and its validations

    def __deepcopy__(self, memo: dict) -> "AfterEpoch":
        """RecTools trains with a copy of the trainer; what it calls is this."""
        return self

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Training begins."""
        scores = Scores(
            module.torch_model,
            module.data_preparator,
            self.handed,
            self.task.get("min_users", 1),
        )
        self.epochs = Epochs(scores, self.task, self.task["epochs"], self.say)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Validates, and stops where it is time."""
        try:
            self.epochs.validate()
        except TrainingEnded as reason:
            self.stopped = str(reason)
            trainer.should_stop = True
        self.seconds = self.epochs.seconds()


if __name__ == "__main__":
    main()
