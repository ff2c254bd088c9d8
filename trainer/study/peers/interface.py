"""What a peer in another environment reads, and how its scores become ranks. Imports NumPy alone.

    FOLDER/users.npy              int64 (U,), numbers of the users that can be split, rising
    FOLDER/lengths.npy            int64 (U,), interactions of each user
    FOLDER/items.npy              int32 (N,), whole histories, user after user, oldest first
    FOLDER/candidates-SPLIT.npy   int64 (U, C), of `validation` and `test`: the held-out item
                                  first; −1 behind shorter lists
    FOLDER/domains.npy            int64 (D, 2): each domain's first row and its items

Items are rows of M. Both sides import this page: the trainer's and the peer's. A position is where
an item stands in a ranked list, from 1.
"""

from pathlib import Path

import numpy as np

# The split (leave-one-out): how many of a user's newest interactions are not seen.
SPLITS = {"validation": 2, "test": 1}


class Handed:
    """The dataset that a peer reads: FOLDER, with the histories jagged.

    Three users and two domains, of rows 0 to 4 and 8 to 11:

        user_U      [  2,       5,             9]
        lengths_U   [  3,       4,             3]
        starts_U    [  0,       3,             7]
        items_N     [1, 0, 8,   4, 9, 2, 10,   8, 11, 3]
        domains_D2  [[0, 5], [8, 4]]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user_U = self.load("users")
        self.lengths_U = self.load("lengths")
        self.items_N = self.load("items")
        self.starts_U = np.cumsum(self.lengths_U) - self.lengths_U
        self.domains_D2 = self.load("domains")

    def load(self, name: str) -> np.ndarray:
        """An array of the folder."""
        return np.load(self.folder / f"{name}.npy", allow_pickle=False)

    def domain_of(self, rows: np.ndarray) -> np.ndarray:
        """Domain numbers, int64, of rows of M, any shape."""
        return (
            np.searchsorted(
                self.domains_D2[:, 0],
                rows,
                side="right",
            )
            - 1
        )

    def padded(
        self,
        users: np.ndarray,
        back: int,
        longest: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The newest `longest` items that users have before their last `back`.

        users: places 0 … U − 1, int64 (B,). Returns the items, int64 (B, longest), on the left and
        0 elsewhere; and how many they are, int64 (B,).

        Of the users above, padded([0, 1], back=1, longest=2), the histories before the test item:

            items    [[1, 0], [9, 2]]
            lengths  [2, 2]
        """
        seen_B = self.lengths_U[users] - back
        kept_B = np.minimum(seen_B, longest)
        first_B = self.starts_U[users] + seen_B - kept_B
        step_T = np.arange(longest)
        step_BT = np.minimum(step_T, kept_B[:, None] - 1)
        items_BT = self.items_N[first_B[:, None] + step_BT]
        is_item_BT = step_T < kept_B[:, None]
        padded_BT = np.where(is_item_BT, items_BT, 0)
        return padded_BT.astype(np.int64), kept_B.astype(np.int64)

    def other_items(
        self,
        users: np.ndarray,
        back: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All else of users' histories, which their held-out item is not compared with.

        Jagged: places among `users`, int64 (E,), and rows of M, int64 (E,).

        Of the users above, other_items([0, 1], back=1), without the test items 8 and 10:

            user_E  [0, 0, 1, 1, 1]
            rows_E  [1, 0, 4, 9, 2]
        """
        lengths_B = self.lengths_U[users]
        starts_B = np.cumsum(lengths_B) - lengths_B
        user_E = np.repeat(np.arange(len(users)), lengths_B)
        place_E = np.arange(len(user_E)) - np.repeat(starts_B, lengths_B)
        first_E = np.repeat(self.starts_U[users], lengths_B)
        rows_E = self.items_N[first_E + place_E].astype(np.int64)
        is_other_E = place_E != lengths_B[user_E] - back
        return user_E[is_other_E], rows_E[is_other_E]


def sampled_positions(
    scores_BC: np.ndarray,
    is_candidate_BC: np.ndarray,
) -> np.ndarray:
    """The position of each user's first candidate among the sampled ones, int64 (B,).

    As trainer/evaluation/sampled.py has it: ties, and scores that are no numbers, count against
    the first candidate. Two users, of whom the second has one candidate less:

        scores_BC        [[0.5, 0.9, 0.1], [0.2, 0.2, 0.7]]
        is_candidate_BC  [[  1,   1,   1], [  1,   1,   0]]
        positions        [2, 2]
    """
    is_below_BC = scores_BC[:, :1] > scores_BC
    return (~is_below_BC & is_candidate_BC).sum(1)


def full_positions(
    scores_BN: np.ndarray,
    place_B: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The position of item place_B among a domain's N items, int64 (B,).

    As trainer/evaluation/full.py has it: 1 + other items, not excluded, whose score is not less.
    excluded: users and places of equal lengths; a pair may stand there twice, or name the ranked
    item. Two users of a domain with three items, where the first has had item 1:

        scores_BN  [[0.5, 0.9, 0.1], [0.2, 0.4, 0.7]]
        place_B    [0, 1]
        excluded   ([0], [1])
        positions  [1, 2]
    """
    user_B = np.arange(len(place_B))
    is_other_BN = np.ones(scores_BN.shape, bool)
    is_other_BN[excluded] = False
    is_other_BN[user_B, place_B] = False
    is_below_BN = scores_BN[user_B, place_B, None] > scores_BN
    return 1 + (~is_below_BN & is_other_BN).sum(1)


def mean_ndcg(
    position_U: np.ndarray,
    domain_U: np.ndarray,
    at: int = 10,
) -> float:
    """The mean over domains with users of NDCG@at; 0.0 without users.

    As `evaluation_record` has it: what chooses a model.
    """
    if not len(position_U):
        return 0.0
    gain_U = np.where(
        position_U <= at,
        1 / np.log2(position_U + 1.0),
        0.0,
    )
    means = []
    for domain in np.unique(domain_U):
        means.append(gain_U[domain_U == domain].mean())
    return float(np.mean(means))
