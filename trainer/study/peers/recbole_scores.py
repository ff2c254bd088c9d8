"""Scores that a RecBole model gives to items for users (peer_scores.py ranks by them).

Runs in RecBole's environment. Shapes: B targets, C candidates, T items of a padded history, I
RecBole's item numbers.
"""

import copy
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import ModelType

from trainer.study.peers.interface import PeerDataset
from trainer.study.peers.peer_process import copy_weights
from trainer.study.peers.peer_scores import PeerScores

# Scores of all items in memory at once: a few models take a vector for each.
_SCORES = 2**20


class Scores(PeerScores):
    """Scores by a model in its state at a call; rows of M become RecBole's numbers."""

    def __init__(
        self,
        config: Config,
        dataset: Any,
        model: Any,
        handed: PeerDataset,
        min_users: int = 1,
    ) -> None:
        """dataset: RecBole's, which numbers users and items. model: RecBole's.

        min_users: as `evaluation.min_users`.
        """
        super().__init__(handed, min_users)
        self.config = config
        self.dataset = dataset
        self.model = model
        self._best_weights: dict[str, torch.Tensor] = {}
        self._best_others: Any = None  # what RecBole keeps beside the weights
        self._transform = construct_transform(config)
        self._sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._pairs_only = (
            False  # whether the model scores pairs of user and item alone
        )
        start, items = handed.domains_D2[-1]
        users_by_token = dataset.field2token_id[dataset.uid_field]
        items_by_token = dataset.field2token_id[dataset.iid_field]
        self._user_number = _numbers(users_by_token, len(handed.user_U))
        self._item_number = _numbers(items_by_token, start + items)

    def keep_best(self) -> None:
        """Copies the weights, and what RecBole keeps beside them."""
        self._best_weights = copy_weights(self.model)
        self._best_others = copy.deepcopy(self.model.other_parameter())

    def restore_best(self) -> None:
        """Puts the model back to its best epoch, as RecBole's own evaluation does."""
        self.model.load_state_dict(self._best_weights)
        self.model.load_other_parameter(self._best_others)

    def count_at_once(self, rows: int) -> int:
        """So many that their scores fit into memory."""
        if self._pairs_only:
            return self.config["eval_batch_size"] // rows
        return _SCORES // self.dataset.item_num

    @torch.no_grad()
    def score(
        self,
        users: np.ndarray,
        back: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """As PeerScores has it."""
        self.model.eval()
        numbers = self._item_number[rows]
        shape = (len(users), numbers.shape[-1])
        number_BC = torch.from_numpy(np.broadcast_to(numbers, shape).copy())
        interaction = self._interaction(users, back)
        if not self._pairs_only:
            try:
                scores = self.model.full_sort_predict(interaction)
                scores_BI = scores.view(len(users), -1)
                return scores_BI.cpu().gather(1, number_BC).float().numpy()
            except NotImplementedError:
                self._pairs_only = True
        return self._score_pairs(interaction, number_BC)

    def _score_pairs(
        self,
        interaction: Interaction,
        number_BC: torch.Tensor,
    ) -> np.ndarray:
        """Scores, float32 (B, C), by a model that scores a pair of user and item at a time."""
        pairs = interaction.repeat_interleave(number_BC.shape[1])
        items = number_BC.view(-1).to(self.config["device"])
        pairs.update(Interaction({self.dataset.iid_field: items}))
        size = self.config["eval_batch_size"]
        parts = []
        for begin in range(0, len(pairs), size):
            scores = self.model.predict(pairs[begin : begin + size])
            parts.append(scores.view(-1).cpu())
        return torch.cat(parts).view(number_BC.shape).float().numpy()

    def _interaction(
        self,
        users: np.ndarray,
        back: np.ndarray,
    ) -> Interaction:
        """What RecBole's own evaluation gives the model.

        But for the held-out item and DIEN's negatives, which are looked up and do not count: they
        are padding. A general model knows users by their number.
        """
        dataset = self.dataset
        config = self.config
        fields = {
            dataset.uid_field: torch.from_numpy(self._user_number[users]),
            dataset.iid_field: torch.zeros(len(users), dtype=torch.int64),
        }
        if self._sequential:
            longest = config["MAX_ITEM_LIST_LENGTH"]
            items_BT, lengths_B = self.handed.padded(
                users,
                back,
                longest,
            )
            is_item_BT = np.arange(longest) < lengths_B[:, None]
            number_BT = np.where(
                is_item_BT,
                self._item_number[items_BT],
                0,
            )
            history = dataset.iid_field + config["LIST_SUFFIX"]
            fields[history] = torch.from_numpy(number_BT)
            negatives = config["NEG_PREFIX"] + history
            fields[negatives] = torch.zeros_like(fields[history])
            fields[config["ITEM_LIST_LENGTH_FIELD"]] = torch.from_numpy(
                lengths_B
            )
        interaction = self._transform(dataset, Interaction(fields))
        return interaction.to(config["device"])


def _numbers(
    token_id: dict[str, int],
    count: int,
) -> np.ndarray:
    """RecBole's numbers of 0 … count − 1, int64; 0, its padding, where it has none."""
    numbers = [token_id.get(str(number), 0) for number in range(count)]
    return np.array(numbers, np.int64)
