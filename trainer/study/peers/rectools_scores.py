"""Scores that a transformer of RecTools gives to items for users (peer_scores.py ranks by them).

Runs in RecTools' environment. Shapes: B targets, C candidates, T items of a padded history, R
dimensions, I RecTools' item numbers.
"""

from typing import Any

import numpy as np
import torch

from trainer.study.peers.interface import PeerDataset
from trainer.study.peers.peer_process import copy_weights
from trainer.study.peers.peer_scores import PeerScores

_AT_ONCE = 256  # histories, as many as RecTools' own `recommend_batch_size`


class Scores(PeerScores):
    """Scores by a model in its state at a call; rows of M become RecTools' numbers.

    RecTools knows the items of the training part alone. Others are left out of histories, as its
    `recommend` does, and score below all that it knows, since it never recommends them.
    """

    def __init__(
        self,
        model: Any,
        preparator: Any,
        handed: PeerDataset,
        min_users: int = 1,
    ) -> None:
        """model: RecTools' backbone. preparator: its data preparator, which numbers items.

        min_users: as `evaluation.min_users`.
        """
        super().__init__(handed, min_users)
        self.model = model
        self._longest = preparator.session_max_len
        self._best_weights: dict[str, torch.Tensor] = {}
        start, items = handed.domains_D2[-1]
        # 0, its padding, for what it does not know.
        self._item_number = np.zeros(start + items, np.int64)
        known = preparator.get_known_item_ids().astype(np.int64)
        numbers = preparator.get_known_items_sorted_internal_ids()
        self._item_number[known] = numbers
        # The known items of all histories, and how many come before each place of `items_N`.
        number_N = self._item_number[handed.items_N]
        self._known = number_N[number_N > 0]
        self._known_before = np.append(0, np.cumsum(number_N > 0))

    def keep_best(self) -> None:
        """Copies the weights."""
        self._best_weights = copy_weights(self.model)

    def restore_best(self) -> None:
        """Puts the weights of the best epoch back."""
        self.model.load_state_dict(self._best_weights)

    def count_at_once(self, rows: int) -> int:
        """So many histories as RecTools encodes together."""
        return _AT_ONCE

    @torch.no_grad()
    def score(
        self,
        users: np.ndarray,
        back: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """As PeerScores has it."""
        was_training = self.model.training
        self.model.eval()
        numbers = self._item_number[rows]
        shape = (len(users), numbers.shape[-1])
        number_BC = torch.from_numpy(np.broadcast_to(numbers, shape).copy())
        history_BT = torch.from_numpy(self._histories(users, back))
        vectors_IR = self.model.item_model.get_all_embeddings()
        y_BTR = self.model.encode_sessions({"x": history_BT}, vectors_IR)
        y_BR = y_BTR[:, -1]
        if numbers.ndim == 1:
            scores_BC = y_BR @ vectors_IR[number_BC[0]].T
        else:
            scores_BC = (vectors_IR[number_BC] @ y_BR.unsqueeze(-1)).squeeze(-1)
        scores_BC[number_BC == 0] = -torch.inf
        self.model.train(was_training)
        return scores_BC.float().numpy()

    def _histories(self, users: np.ndarray, back: np.ndarray) -> np.ndarray:
        """RecTools' numbers of histories, int64 (B, T), on the right, and 0 before them."""
        first_B = self.handed.starts_U[users]
        seen_B = self.handed.lengths_U[users] - back
        end_B = self._known_before[first_B + seen_B]
        begin_B = self._known_before[first_B]
        step_T = np.arange(self._longest) - self._longest
        place_BT = end_B[:, None] + step_T
        is_item_BT = place_BT >= begin_B[:, None]
        return np.where(is_item_BT, self._known[np.maximum(place_BT, 0)], 0)
