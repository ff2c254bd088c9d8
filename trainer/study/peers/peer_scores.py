"""Ranks of held-out items by the scores of a peer's model, by our rules.

Runs in a peer's environment, and needs NumPy alone. Shapes: T targets, B some of them, C candidates,
N items of a domain, E excluded pairs.
"""

import numpy as np

from trainer.evaluation.metrics import (
    mean_ndcg,
    padded_candidate_positions,
    positions_among_all,
)
from trainer.study.peers.interface import SPLITS, PeerDataset


class PeerScores:
    """Ranks by a model in its state at a call. Each peer says how its model scores."""

    def __init__(self, handed: PeerDataset, min_users: int = 1) -> None:
        """min_users: as `evaluation.min_users`."""
        self.handed = handed
        self.min_users = min_users
        self._candidates = {}
        self._targets = {}
        for split in SPLITS:
            self._candidates[split] = handed.load(f"candidates-{split}")
            self._targets[split] = handed.targets(split)

    def count_at_once(self, rows: int) -> int:
        """How many targets are scored together. rows: that are scored for each."""
        raise NotImplementedError

    def score(
        self,
        users: np.ndarray,
        back: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Scores, float32 (B, C), of rows of M (B, C), or of the same rows for all, (C,).

        users: places 0 … U − 1, int64 (B,). back: int64 (B,); the model sees all of a history but
        its last `back`.
        """
        raise NotImplementedError

    def keep_best(self) -> None:
        """Copies the model, which is the best so far."""
        raise NotImplementedError

    def restore_best(self) -> None:
        """Puts the model back to what was copied."""
        raise NotImplementedError

    def validation(self) -> float:
        """The mean over the domains that count of NDCG@10 of the validation items."""
        rows_TC = self._candidates["validation"]
        every_target = np.arange(len(rows_TC))
        positions = [np.zeros(0, np.int64)]
        for chosen in self._batches(every_target, rows_TC.shape[1]):
            rows_BC = rows_TC[chosen]
            scores_BC = self._score_targets(
                "validation", chosen, np.maximum(rows_BC, 0)
            )
            positions.append(
                padded_candidate_positions(scores_BC, rows_BC >= 0)
            )
        domain_T = self.handed.domain_of(rows_TC[:, 0])
        return mean_ndcg(
            np.concatenate(positions), domain_T, least=self.min_users
        )

    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of the test items, each int32 (T,): among candidates, and in their whole domains."""
        handed = self.handed
        rows_TC = self._candidates["test"]
        domain_T = handed.domain_of(rows_TC[:, 0])
        sampled_T = np.zeros(len(rows_TC), np.int32)
        full_T = np.zeros(len(rows_TC), np.int32)
        is_ranked_N = handed.load("ranked")
        for domain, (start, items) in enumerate(handed.domains_D2):
            rows_N = np.arange(start, start + items)
            rows_N = rows_N[is_ranked_N[rows_N]]
            of_domain = np.flatnonzero(domain_T == domain)
            for chosen in self._batches(of_domain, len(rows_N)):
                scores_BN = self._score_targets("test", chosen, rows_N)
                rows_BC = rows_TC[chosen]
                is_row_BC = rows_BC >= 0
                place_BC = np.searchsorted(
                    rows_N, np.where(is_row_BC, rows_BC, start)
                )
                scores_BC = np.take_along_axis(scores_BN, place_BC, 1)
                sampled_T[chosen] = padded_candidate_positions(
                    scores_BC, is_row_BC
                )
                full_T[chosen] = positions_among_all(
                    scores_BN,
                    place_BC[:, 0],
                    self._excluded(chosen, rows_N),
                )
        return sampled_T, full_T

    def _excluded(
        self,
        chosen: np.ndarray,
        rows_N: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of test targets and places among rows_N that the held-out item is not compared with."""
        user_T, back_T = self._targets["test"]
        user_E, rows_E = self.handed.other_items(user_T[chosen], back_T[chosen])
        is_ranked_E = np.isin(rows_E, rows_N)
        place_E = np.searchsorted(rows_N, rows_E[is_ranked_E])
        return user_E[is_ranked_E], place_E

    def _score_targets(
        self,
        split: str,
        chosen: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """`score` of some targets, int64 (B,)."""
        user_T, back_T = self._targets[split]
        return self.score(user_T[chosen], back_T[chosen], rows)

    def _batches(self, targets: np.ndarray, rows: int) -> list[np.ndarray]:
        """Some targets at a time. rows: that are scored for each."""
        size = max(1, self.count_at_once(rows))
        return np.split(targets, range(size, len(targets), size))
