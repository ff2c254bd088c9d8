"""What a peer in another environment reads, of a dataset. Imports NumPy alone.

    FOLDER/users.npy              int64 (U,), numbers of the users, rising
    FOLDER/lengths.npy            int64 (U,), interactions of each user
    FOLDER/training.npy           int64 (U,), how many of them, from the oldest on, are trained on
    FOLDER/items.npy              int32 (N,), whole histories, user after user, oldest first
    FOLDER/targets-SPLIT.npy      int64 (T, 2), of `validation` and `test`: the target's place
                                  among the users, and in the user's history
    FOLDER/candidates-SPLIT.npy   int64 (T, C), of each target: the held-out item first; −1 behind
                                  shorter lists
    FOLDER/domains.npy            int64 (D, 2): each domain's first row and its items
    FOLDER/ranked.npy             bool (rows of M,), whether a full ranking has the item

By leave-one-out the users are those that can be split, with one target each: T is U. By the
timeline they are all users, and targets are those whose item training has seen. Items are rows of M. Both sides import this page: the trainer's and the peer's. A position is where
an item stands in a ranked list, from 1.
"""

from pathlib import Path

import numpy as np

from trainer.data import split

# Leave-one-out: how many of a user's newest interactions are not seen.
SPLITS = {name: part.offset for name, part in split.SPLITS.items()}


class PeerDataset:
    """The dataset that a peer reads: FOLDER, with the histories jagged.

    Three users and two domains, of rows 0 to 4 and 8 to 11, by leave-one-out:

        user_U      [  2,       5,             9]
        lengths_U   [  3,       4,             3]
        training_U  [  1,       2,             1]
        starts_U    [  0,       3,             7]
        items_N     [1, 0, 8,   4, 9, 2, 10,   8, 11, 3]
        domains_D2  [[0, 5], [8, 4]]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user_U = self.load("users")
        self.lengths_U = self.load("lengths")
        self.training_U = self.load("training")
        self.items_N = self.load("items")
        self.starts_U = np.cumsum(self.lengths_U) - self.lengths_U
        self.domains_D2 = self.load("domains")

    def load(self, name: str) -> np.ndarray:
        """An array of the folder."""
        return np.load(self.folder / f"{name}.npy", allow_pickle=False)

    def targets(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The targets of "validation" or "test": users, and where their held-out items are.

        Places 0 … U − 1, int64 (T,); and the item counted from the end of the history, int64 (T,),
        1 for the newest. Of the users above, targets("validation"):

            user_T  [0, 1, 2]
            back_T  [2, 2, 2]
        """
        targets_T2 = self.load(f"targets-{split}")
        user_T = targets_T2[:, 0]
        back_T = self.lengths_U[user_T] - targets_T2[:, 1]
        return user_T, back_T

    def training_places(self) -> tuple[np.ndarray, np.ndarray]:
        """The training part: each interaction's user, and its place in `items_N`, int64 (E,) each.

        Of the users above:

            user_E   [0, 1, 1, 2]
            place_E  [0, 3, 4, 7]
        """
        user_E = np.repeat(np.arange(len(self.training_U)), self.training_U)
        before_U = np.cumsum(self.training_U) - self.training_U
        step_E = np.arange(len(user_E)) - before_U[user_E]
        return user_E, self.starts_U[user_E] + step_E

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
        back: int | np.ndarray,
        longest: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The newest `longest` items that users have before their last `back`.

        users: places 0 … U − 1, int64 (B,). back: one for all, or int64 (B,). Returns the items, int64 (B, longest), on the left and
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
        back: int | np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All else of users' histories, which their held-out item is not compared with.

        back: one for all, or int64 (B,). Jagged: places among `users`, int64 (E,), and rows of M,
        int64 (E,).

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
        held_out_B = lengths_B - back
        is_other_E = place_E != held_out_B[user_E]
        return user_E[is_other_E], rows_E[is_other_E]
