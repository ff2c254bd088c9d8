"""Exports a dataset for a peer in another environment (interface.py)."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from trainer.config.evaluation import EvaluationConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.histories import Histories, UserHistories
from trainer.data.split import LEAVE_ONE_OUT, SPLIT_LENGTH, can_be_split
from trainer.errors import InputError
from trainer.evaluation.sampled import RankingBatches
from trainer.evaluation.targets import Targets, find_targets
from trainer.study.peers.interface import SPLITS, PeerDataset

LOG = "training"  # RecBole's name of the training data
_AT_ONCE = 4096  # users that are read together


def export_dataset(
    dataset: Dataset,
    folder: Path,
    seed: int = 0,
    negatives: int = 99,
) -> PeerDataset:
    """Writes what `PeerDataset` reads into a folder that is there, and returns it.

    The dataset's split holds (trainer/data/split.py). By leave-one-out, users too short to be split
    are left out; by the timeline, targets whose item training has not seen, which count in no mean.
    seed: of the candidates (negative sampling), a run's `seed`. negatives: as
    `evaluation.negatives`.

    Raises InputError where no user can be split.
    """
    parts = _collect(dataset, seed, negatives)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    if not len(arrays["users"]):
        raise InputError(
            f"{dataset.place}: no user has the {SPLIT_LENGTH} interactions that are "
            "needed to be split"
        )
    domains = [(domain.start, domain.items) for domain in dataset.domains]
    arrays["domains"] = np.array(domains, np.int64)
    rows_N = np.arange(dataset.num_embeddings)
    arrays["ranked"] = dataset.is_trained(rows_N)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return PeerDataset(folder)


def _collect(
    dataset: Dataset,
    seed: int,
    negatives: int,
) -> dict[str, list[np.ndarray]]:
    """The arrays by the names of their files, a part for every so many users."""
    config = EvaluationConfig(negatives=negatives)
    longest = 1 + negatives
    candidates = {}
    # Something of each, so that there is a type where there are no users.
    parts: dict[str, list[np.ndarray]] = {
        "users": [np.zeros(0, np.int64)],
        "lengths": [np.zeros(0, np.int64)],
        "training": [np.zeros(0, np.int64)],
        "items": [np.zeros(0, np.int32)],
    }
    for split in SPLITS:
        candidates[split] = RankingBatches(
            dataset,
            0,
            1,
            config,
            1,
            split,
            seed=seed,
        )
        parts[f"targets-{split}"] = [np.zeros((0, 2), np.int64)]
        parts[f"candidates-{split}"] = [np.zeros((0, longest), np.int64)]
    histories = Histories.of_schedule(candidates["test"].plan)
    exported = 0
    for first in range(0, dataset.users, _AT_ONCE):
        last = min(first + _AT_ONCE, dataset.users)
        users = histories.read(np.arange(first, last))
        kept_B = _exported_users(dataset, users)
        training_B = dataset.split.training_lengths(
            users.lengths_B, users.ticks_N
        )
        parts["users"].append(users.number_B[kept_B])
        parts["lengths"].append(users.lengths_B[kept_B])
        parts["training"].append(training_B[kept_B])
        kept_N = np.repeat(kept_B, users.lengths_B)
        parts["items"].append(users.items_N[kept_N])
        place_B = exported + np.cumsum(kept_B) - 1
        exported += int(kept_B.sum())
        for split, batches in candidates.items():
            targets = _counted_targets(dataset, split, users)
            if len(targets) == 0:
                continue
            built = batches.build(users, targets)
            rows_TC = _pad(
                built.rows_C,
                built.counts_B,
                longest,
            )
            user_T = place_B[targets.user_T]
            targets_T2 = np.stack([user_T, targets.place_T], axis=1)
            parts[f"targets-{split}"].append(targets_T2)
            parts[f"candidates-{split}"].append(rows_TC)
    histories.close()
    return parts


def _exported_users(dataset: Dataset, users: UserHistories) -> np.ndarray:
    """Which users a peer is handed, bool (B,): by the timeline all of them."""
    if dataset.split.name == LEAVE_ONE_OUT.name:
        return can_be_split(users.lengths_B)
    return np.ones(len(users.number_B), bool)


def _counted_targets(
    dataset: Dataset, split: str, users: UserHistories
) -> Targets:
    """The targets of some users whose item training has seen: by leave-one-out all."""
    targets = find_targets(dataset, split, users)
    starts_B = np.cumsum(users.lengths_B) - users.lengths_B
    event_T = starts_B[targets.user_T] + targets.place_T
    is_seen_T = dataset.is_trained(users.items_N[event_T])
    return targets.choose(is_seen_T)


def write_log(handed: PeerDataset) -> None:
    """Writes the training part in RecBole's own format, and all items.

    An item that is only ever held out has a vector too, as with us. What is held out is not in
    the log: by its own split, RecBole's sequential models train on the validation item of a user
    who has three interactions. Its times are float32, so the place in the history stands for time.
    """
    folder = handed.folder / LOG
    folder.mkdir(exist_ok=True)
    user_E, place_E = handed.training_places()
    interactions = {
        "user_id:token": user_E,
        "item_id:token": handed.items_N[place_E],
        "timestamp:float": place_E - handed.starts_U[user_E],
    }
    rows = [
        np.arange(start, start + items) for start, items in handed.domains_D2
    ]
    _write_tsv(folder / f"{LOG}.inter", interactions)
    _write_tsv(folder / f"{LOG}.item", {"item_id:token": np.concatenate(rows)})


def _write_tsv(
    file: Path,
    columns: dict[str, np.ndarray],
) -> None:
    """Writes columns as RecBole reads them: a header with types, and tabs."""
    options = csv.WriteOptions(include_header=False, delimiter="\t")
    header = "\t".join(columns) + "\n"
    with open(file, "wb") as stream:
        stream.write(header.encode())  # pyarrow would put it in quotation marks
        csv.write_csv(
            pa.table(columns),
            stream,
            options,
        )


def _pad(
    rows_C: np.ndarray,
    counts_B: np.ndarray,
    longest: int,
) -> np.ndarray:
    """Jagged rows as (B, longest), −1 behind the shorter ones.

    Two users, of whom the second has one candidate less:

        rows_C   [8, 9, 11,   3, 0]
        counts_B [3, 2]
        padded   [[8, 9, 11], [3, 0, -1]]
    """
    rows_BC = np.full(
        (len(counts_B), longest),
        -1,
        np.int64,
    )
    is_row_BC = np.arange(longest) < counts_B[:, None]
    rows_BC[is_row_BC] = rows_C
    return rows_BC
