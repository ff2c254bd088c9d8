"""Scores that a RecBole model gives to items for users, and the ranks that follow.

Runs in RecBole's environment. Shapes: U users that can be split, B some of them, C candidates, N
items of a domain, T items of a padded history, E excluded pairs, I RecBole's item numbers.
"""

from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import ModelType

from trainer.evaluation.metrics import (
    mean_ndcg,
    padded_candidate_positions,
    positions_among_all,
)
from trainer.study.peers.interface import SPLITS, PeerDataset

# Scores of all items in memory at once: a few models take a vector for each.
_SCORES = 2**20


class Scores:
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
        self.min_users = min_users
        self.config = config
        self.dataset = dataset
        self.model = model
        self.handed = handed
        self._transform = construct_transform(config)
        self._sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._pairs_only = (
            False  # whether the model scores pairs of user and item alone
        )
        self._candidates = {}
        for split in SPLITS:
            self._candidates[split] = handed.load(f"candidates-{split}")
        start, items = handed.domains_D2[-1]
        users_by_token = dataset.field2token_id[dataset.uid_field]
        items_by_token = dataset.field2token_id[dataset.iid_field]
        self._user_number = _numbers(users_by_token, len(handed.user_U))
        self._item_number = _numbers(items_by_token, start + items)

    def validation(self) -> float:
        """The mean over the domains that count of NDCG@10 of the validation items among their candidates."""
        rows_UC = self._candidates["validation"]
        positions = []
        every_user = np.arange(len(rows_UC))
        for users in self._batches(every_user, rows_UC.shape[1]):
            rows_BC = rows_UC[users]
            scores_BC = self._score(
                users,
                "validation",
                np.maximum(rows_BC, 0),
            )
            positions.append(
                padded_candidate_positions(scores_BC, rows_BC >= 0)
            )
        domain_U = self.handed.domain_of(rows_UC[:, 0])
        return mean_ndcg(
            np.concatenate(positions), domain_U, least=self.min_users
        )

    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of the test items, each int32 (U,): among candidates, and in their whole domains."""
        handed = self.handed
        rows_UC = self._candidates["test"]
        domain_U = handed.domain_of(rows_UC[:, 0])
        sampled_U = np.zeros(len(rows_UC), np.int32)
        full_U = np.zeros(len(rows_UC), np.int32)
        for domain, (start, items) in enumerate(handed.domains_D2):
            rows_N = np.arange(start, start + items)
            for users in self._batches(
                np.flatnonzero(domain_U == domain), items
            ):
                scores_BN = self._score(users, "test", rows_N)
                rows_BC = rows_UC[users]
                place_BC = np.maximum(rows_BC - start, 0)
                scores_BC = np.take_along_axis(
                    scores_BN,
                    place_BC,
                    1,
                )
                sampled_U[users] = padded_candidate_positions(
                    scores_BC, rows_BC >= 0
                )
                user_E, rows_E = handed.other_items(users, SPLITS["test"])
                inside_E = (rows_E >= start) & (rows_E < start + items)
                excluded = (user_E[inside_E], rows_E[inside_E] - start)
                full_U[users] = positions_among_all(
                    scores_BN,
                    place_BC[:, 0],
                    excluded,
                )
        return sampled_U, full_U

    def _batches(
        self,
        users: np.ndarray,
        rows: int,
    ) -> list[np.ndarray]:
        """Some users at a time, so many that their scores fit into memory.

        rows: that are scored for each.
        """
        if self._pairs_only:
            size = self.config["eval_batch_size"] // rows
        else:
            size = _SCORES // self.dataset.item_num
        size = max(1, size)
        return np.split(users, range(size, len(users), size))

    @torch.no_grad()
    def _score(
        self,
        users: np.ndarray,
        split: str,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Scores, float32 (B, C), of rows (B, C), or of the same rows for all, (C,).

        users: places 0 … U − 1. split: how much of their histories the model sees.
        """
        self.model.eval()
        numbers = self._item_number[rows]
        shape = (len(users), numbers.shape[-1])
        number_BC = torch.from_numpy(np.broadcast_to(numbers, shape).copy())
        interaction = self._interaction(users, split)
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
        split: str,
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
            back = SPLITS[split]
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
