"""Exports a dataset for a peer in another environment (interface.py)."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from trainer.config.evaluation import EvaluationConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.histories import Histories
from trainer.data.split import SPLIT_LENGTH
from trainer.errors import InputError
from trainer.evaluation.sampled import RankingBatches
from trainer.study.peers.interface import SPLITS, PeerDataset

LOG = "training"  # RecBole's name of the training data
_AT_ONCE = 4096  # users that are read together


def export_dataset(
    dataset: Dataset,
    folder: Path,
    seed: int = 0,
    negatives: int = 99,
) -> PeerDataset:
    """Writes what `Handed` reads into a folder that is there, and returns it.

    Users too short to be split are left out. seed: of the candidates (negative sampling), a run's
    `seed`. negatives: as `evaluation.negatives`.

    Raises InputError where no user can be split.
    """
    arrays = _collect(dataset, seed, negatives)
    if not len(arrays["users"]):
        raise InputError(
            f"{dataset.place}: no user has the {SPLIT_LENGTH} interactions that are "
            "needed to be split"
        )
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    domains = [(domain.start, domain.items) for domain in dataset.domains]
    np.save(folder / "domains.npy", np.array(domains, np.int64))
    return PeerDataset(folder)


def _collect(
    dataset: Dataset,
    seed: int,
    negatives: int,
) -> dict[str, np.ndarray]:
    """The arrays by the names of their files, but for the domains."""
    config = EvaluationConfig(negatives=negatives)
    longest = 1 + negatives
    candidates = {}
    # Something of each, so that there is a type where there are no users.
    parts: dict[str, list[np.ndarray]] = {
        "users": [np.zeros(0, np.int64)],
        "lengths": [np.zeros(0, np.int64)],
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
        parts[f"candidates-{split}"] = [np.zeros((0, longest), np.int64)]
    histories = Histories.of_schedule(candidates["test"].plan)
    for first in range(0, dataset.users, _AT_ONCE):
        last = min(first + _AT_ONCE, dataset.users)
        users = histories.read(np.arange(first, last))
        long_B = users.lengths_B >= SPLIT_LENGTH
        if not long_B.any():
            continue
        parts["users"].append(users.number_B[long_B])
        parts["lengths"].append(users.lengths_B[long_B])
        long_N = np.repeat(long_B, users.lengths_B)
        parts["items"].append(users.items_N[long_N])
        for split, batches in candidates.items():
            built = batches.build(users)
            rows_BC = _pad(
                built.rows_C,
                built.counts_B,
                longest,
            )
            parts[f"candidates-{split}"].append(rows_BC)
    histories.close()
    return {name: np.concatenate(values) for name, values in parts.items()}


def write_log(handed: PeerDataset) -> None:
    """Writes the training part in RecBole's own format, and all items.

    An item that is only ever held out has a vector too, as with us. The held-out two are not in
    the log: by its own split, RecBole's sequential models train on the validation item of a user
    who has three interactions. Its times are float32, so the place in the history stands for time.
    """
    folder = handed.folder / LOG
    folder.mkdir(exist_ok=True)
    user_U = np.arange(len(handed.lengths_U))
    user_N = np.repeat(user_U, handed.lengths_U)
    place_N = np.arange(len(user_N)) - handed.starts_U[user_N]
    held_out = max(SPLITS.values())
    training_N = place_N < handed.lengths_U[user_N] - held_out
    interactions = {
        "user_id:token": user_N[training_N],
        "item_id:token": handed.items_N[training_N],
        "timestamp:float": place_N[training_N],
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
