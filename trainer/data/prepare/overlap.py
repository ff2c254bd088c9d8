"""The users that domains share: what can be learnt from one domain about another.

    DIR/overlap.json    users_by_domains: how many users are in 1, 2, … domains
                        shared_users: pairs of domains and how many users are in both, most first

Of four users, of whom the first is in both of two domains, the third in the first alone, and the
others in the second alone, these are [3, 1] and [["books", "films", 1]].
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OVERLAP = "overlap.json"
OVERLAP_COUNTS = "overlap.npy"  # of a part
_MOST_PAIRS = 1000


def count_overlap(counts_UD: np.ndarray) -> np.ndarray:
    """Counts users by pair of domains, and by how many domains they are in, int64 (D + 1, D).

    counts_UD    [[3, 1], [0, 1], [3, 0], [0, 2]]
    returns      [[2, 1], [1, 3],     users of each pair of domains
                  [3, 1]]             users of 1 and of 2 domains
    """
    domains = counts_UD.shape[1]
    active_UD = counts_UD > 0
    # Whole numbers below 2^53 are exact, and products of floats are fast.
    weights_UD = active_UD.astype(np.float64)
    pairs_DD = weights_UD.T @ weights_UD
    by_number = np.bincount(active_UD.sum(axis=1), minlength=domains + 1)
    overlap = np.vstack([pairs_DD, by_number[1:]])
    return overlap.astype(np.int64)


@dataclass(frozen=True)
class Overlap:
    """How many users are in 1, 2, … domains, and in pairs of domains, most first."""

    users_by_domains: tuple[int, ...]
    shared_users: tuple[tuple[str, str, int], ...]

    @classmethod
    def load(cls, folder: Path) -> "Overlap | None":
        """Reads what `write_overlap` wrote; None for a dataset of an earlier version."""
        file = folder / OVERLAP
        if not file.is_file():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        pairs = []
        for one, other, users in record["shared_users"]:
            pairs.append((one, other, users))
        return cls(tuple(record["users_by_domains"]), tuple(pairs))

    @property
    def is_disjoint(self) -> bool:
        """Whether there are several domains, and no user is in two of them."""
        return len(self.users_by_domains) > 1 and not any(
            self.users_by_domains[1:]
        )


def write_overlap(
    folder: Path, names: Sequence[str], part_folders: list[Path]
) -> None:
    """Writes overlap.json from the counts of all parts."""
    counts = np.zeros((len(names) + 1, len(names)), np.int64)
    for part in part_folders:
        counts += np.load(part / OVERLAP_COUNTS)
    pairs = []
    for one, other in itertools.combinations(range(len(names)), 2):
        users = int(counts[one, other])
        if users:
            pairs.append((names[one], names[other], users))
    pairs.sort(key=lambda pair: -pair[2])
    record = {
        "users_by_domains": counts[-1].tolist(),
        "shared_users": pairs[:_MOST_PAIRS],
    }
    text = json.dumps(record, ensure_ascii=False) + "\n"
    (folder / OVERLAP).write_text(text, encoding="utf-8")
