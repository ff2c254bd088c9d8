"""A dataset as a peer in another environment reads it (handed.py)."""

import numpy as np
import pyarrow as pa
from pyarrow import csv

from trainer.config.evaluation import EvaluationConfig
from trainer.data.format.dataset import SPLIT_LENGTH
from trainer.data.loading.histories import Histories
from trainer.errors import InputError
from trainer.evaluation.sampled import RankingBatches
from trainer.study.peers.interface import SPLITS, Handed

LOG = "training"  # RecBole's name of what is trained on
_AT_ONCE = 4096  # users that are read together


def hand_over(dataset, folder, seed=0, negatives=99) -> Handed:
    """Writes into `folder`, which is there, what `Handed` reads, and returns that. Users too short to be split are left out.

    seed: of the candidates, a run's `seed`; negatives: as `evaluation.negatives`. Raises InputError where nobody can be split.
    """
    config = EvaluationConfig(negatives=negatives)
    candidates = {
        split: RankingBatches(dataset, 0, 1, config, 1, split, seed=seed)
        for split in SPLITS
    }
    histories = Histories.of_plan(candidates["test"].plan)
    # Something of each, so that there is a type where there are no users.
    numbers, lengths, items = (
        [np.zeros(0, np.int64)],
        [np.zeros(0, np.int64)],
        [np.zeros(0, np.int32)],
    )
    rows = {split: [np.zeros((0, 1 + negatives), np.int64)] for split in SPLITS}
    for first in range(0, dataset.users, _AT_ONCE):
        users = histories.read(np.arange(first, min(first + _AT_ONCE, dataset.users)))
        long_B = users.lengths_B >= SPLIT_LENGTH
        if not long_B.any():
            continue
        numbers.append(users.number_B[long_B])
        lengths.append(users.lengths_B[long_B])
        items.append(users.items_N[np.repeat(long_B, users.lengths_B)])
        for split in SPLITS:
            built = candidates[split].build(users)
            rows[split].append(
                _rectangular(built.rows_C, built.counts_B, 1 + negatives)
            )
    histories.close()
    arrays = {"users": numbers, "lengths": lengths, "items": items} | {
        f"candidates-{split}": rows[split] for split in SPLITS
    }
    if not sum(map(len, numbers)):
        raise InputError(
            f"{dataset.place}: no user has the {SPLIT_LENGTH} interactions that are needed to be split"
        )
    for name, parts in arrays.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    np.save(
        folder / "domains.npy",
        np.array(
            [(domain.start, domain.items) for domain in dataset.domains], np.int64
        ),
    )
    return Handed(folder)


def write_log(handed: Handed):
    """The training part in RecBole's own format, and all items there are, so that one that is only ever held out has a vector
    too, as with us.

    The held-out two are not in it: by its own split, RecBole's sequential models train on the validation item of a user who has
    three interactions. Its times are float32, so the place in the history stands for the time.
    """
    folder = handed.folder / LOG
    folder.mkdir(exist_ok=True)
    user_N = np.repeat(np.arange(len(handed.lengths_U)), handed.lengths_U)
    place_N = np.arange(len(user_N)) - handed.starts_U[user_N]
    training_N = place_N < handed.lengths_U[user_N] - max(SPLITS.values())
    columns = {
        "user_id:token": user_N[training_N],
        "item_id:token": handed.items_N[training_N],
        "timestamp:float": place_N[training_N],
    }
    items = np.concatenate(
        [np.arange(start, start + items) for start, items in handed.domains_D2]
    )
    _write(folder / f"{LOG}.inter", columns)
    _write(folder / f"{LOG}.item", {"item_id:token": items})


def _write(file, columns):
    with open(file, "wb") as stream:
        stream.write(
            "\t".join(columns).encode() + b"\n"
        )  # pyarrow would put it in quotation marks
        csv.write_csv(
            pa.table(columns),
            stream,
            csv.WriteOptions(include_header=False, delimiter="\t"),
        )


def _rectangular(rows_C, counts_B, longest):
    """Jagged rows as (B, longest), −1 behind the shorter ones."""
    rows_BC = np.full((len(counts_B), longest), -1, np.int64)
    rows_BC[np.arange(longest) < counts_B[:, None]] = rows_C
    return rows_BC
