"""What a peer in another environment is handed, and how its scores become ranks. Both sides import this: NumPy is all there is.

FOLDER/users.npy                 int64 (U,), numbers of the users that can be split, rising
FOLDER/lengths.npy, items.npy    int64 (U,), int32 (N,): their whole histories, user after user, oldest first, rows of M
FOLDER/candidates-SPLIT.npy      int64 (U, C) of `validation` and `test`: the held-out item first; −1 behind shorter lists
FOLDER/domains.npy               int64 (D, 2): each domain's first row and its items
"""

from pathlib import Path

import numpy as np

SPLITS = {"validation": 2, "test": 1}  # how many of a user's newest are not seen


class Handed:
    """What FOLDER holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.user_U, self.lengths_U, self.items_N = (
            self.load("users"),
            self.load("lengths"),
            self.load("items"),
        )
        self.starts_U = np.cumsum(self.lengths_U) - self.lengths_U
        self.domains_D2 = self.load("domains")

    def load(self, name):
        """An array of the folder."""
        return np.load(self.folder / f"{name}.npy", allow_pickle=False)

    def domain_of(self, rows):
        """Domain numbers, int64, of rows of M, any shape."""
        return np.searchsorted(self.domains_D2[:, 0], rows, side="right") - 1

    def padded(self, users, back, longest):
        """The newest of what some users (places 0 … U − 1, int64 (B,)) have before their last `back`: int64 (B, longest), on
        the left, 0 elsewhere; and how many, int64 (B,)."""
        seen_B = self.lengths_U[users] - back
        kept_B = np.minimum(seen_B, longest)
        place_T = np.arange(longest)
        place_BT = (self.starts_U[users] + seen_B - kept_B)[:, None] + np.minimum(
            place_T, kept_B[:, None] - 1
        )
        return np.where(place_T < kept_B[:, None], self.items_N[place_BT], 0).astype(
            np.int64
        ), kept_B.astype(np.int64)

    def others(self, users, back):
        """What some users' held-out item is not compared with, all else of their histories, jagged: (places among `users` (E,),
        rows (E,)), int64."""
        lengths_B = self.lengths_U[users]
        user_E = np.repeat(np.arange(len(users)), lengths_B)
        place_E = np.arange(len(user_E)) - np.repeat(
            np.cumsum(lengths_B) - lengths_B, lengths_B
        )
        rows_E = self.items_N[
            np.repeat(self.starts_U[users], lengths_B) + place_E
        ].astype(np.int64)
        kept_E = place_E != lengths_B[user_E] - back
        return user_E[kept_E], rows_E[kept_E]


def sampled_ranks(scores_BC, there_BC):
    """The 1-based rank of each user's first candidate among those that are there, int64 (B,), as trainer/evaluation/sampled.py has it:
    equal scores, and scores that are no numbers, count against it."""
    return (~(scores_BC[:, :1] > scores_BC) & there_BC).sum(1)


def full_ranks(scores_BN, place_B, excluded):
    """The 1-based rank of item place_B among a domain's N, int64 (B,), as trainer/evaluation/full.py has it: 1 + other items, not
    excluded, whose score is not less. excluded: (users, places) of equal lengths; an item that stands there twice, or is the
    ranked one, is none the less."""
    user_B = np.arange(len(place_B))
    others_BN = np.ones(scores_BN.shape, bool)
    others_BN[excluded] = False
    others_BN[user_B, place_B] = False
    return 1 + (~(scores_BN[user_B, place_B, None] > scores_BN) & others_BN).sum(1)


def mean_ndcg(rank_U, domain_U, at=10):
    """The mean over domains with users of NDCG@at: what chooses a model, as `evaluation_record` has it; 0.0 without users."""
    gain_U = np.where(rank_U <= at, 1 / np.log2(rank_U + 1.0), 0.0)
    return (
        float(
            np.mean(
                [gain_U[domain_U == domain].mean() for domain in np.unique(domain_U)]
            )
        )
        if len(rank_U)
        else 0.0
    )
