"""Scores that a RecBole model gives to rows of M for users of a Handed, and their ranks. Runs in RecBole's environment."""

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import ModelType

from trainer.study.peers.interface import SPLITS, full_ranks, mean_ndcg, sampled_ranks

_SCORES = (
    2**20
)  # of all items, that are in memory at once: a few models take a vector for each


class Scores:
    """dataset: RecBole's, of which the ids are; the model is scored as it is at a call."""

    def __init__(self, config, dataset, model, handed):
        self.config, self.dataset, self.model, self.handed = (
            config,
            dataset,
            model,
            handed,
        )
        self._transform = construct_transform(config)
        self._sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._one_by_one = (
            False  # True: the model scores pairs of a user and an item alone
        )
        self._candidates = {
            split: handed.load(f"candidates-{split}") for split in SPLITS
        }
        self._user_number = _numbers(
            dataset.field2token_id[dataset.uid_field], len(handed.user_U)
        )
        start, items = handed.domains_D2[-1]
        self._item_number = _numbers(
            dataset.field2token_id[dataset.iid_field], start + items
        )

    def validation(self):
        """The mean over domains of NDCG@10 of the validation items among their candidates."""
        rows_UC = self._candidates["validation"]
        ranks = []
        for users in self._batches(np.arange(len(rows_UC)), rows_UC.shape[1]):
            rows_BC = rows_UC[users]
            ranks.append(
                sampled_ranks(
                    self._of(users, "validation", np.maximum(rows_BC, 0)), rows_BC >= 0
                )
            )
        return mean_ndcg(np.concatenate(ranks), self.handed.domain_of(rows_UC[:, 0]))

    def test(self):
        """Ranks of the test items, each int32 (U,): among their candidates, and among all items of their domains."""
        rows_UC, back = self._candidates["test"], SPLITS["test"]
        domain_U = self.handed.domain_of(rows_UC[:, 0])
        sampled_U, full_U = np.zeros((2, len(rows_UC)), np.int32)
        for domain, (start, items) in enumerate(self.handed.domains_D2):
            for users in self._batches(np.flatnonzero(domain_U == domain), items):
                scores_BN = self._of(users, "test", np.arange(start, start + items))
                place_BC, there_BC = (
                    np.maximum(rows_UC[users] - start, 0),
                    rows_UC[users] >= 0,
                )
                sampled_U[users] = sampled_ranks(
                    np.take_along_axis(scores_BN, place_BC, 1), there_BC
                )
                user_E, rows_E = self.handed.others(users, back)
                own_E = (rows_E >= start) & (rows_E < start + items)
                full_U[users] = full_ranks(
                    scores_BN, place_BC[:, 0], (user_E[own_E], rows_E[own_E] - start)
                )
        return sampled_U, full_U

    def _batches(self, users, rows):
        """Some users at a time; rows: that each is asked for."""
        size = max(
            1,
            self.config["eval_batch_size"] // rows
            if self._one_by_one
            else _SCORES // self.dataset.item_num,
        )
        return np.split(users, range(size, len(users), size))

    @torch.no_grad()
    def _of(self, users, split, rows):
        """Scores, float32 (B, C), of rows (B, C), or of the same for all (C,)."""
        self.model.eval()
        number = torch.from_numpy(
            np.broadcast_to(
                self._item_number[rows], (len(users), np.shape(rows)[-1])
            ).copy()
        )
        interaction = self._interaction(users, split)
        if not self._one_by_one:
            try:
                scores_BI = self.model.full_sort_predict(interaction).view(
                    len(users), -1
                )
                return scores_BI.cpu().gather(1, number).float().numpy()
            except NotImplementedError:
                self._one_by_one = True
        pairs, size, parts = (
            interaction.repeat_interleave(number.shape[1]),
            self.config["eval_batch_size"],
            [],
        )
        pairs.update(
            Interaction(
                {self.dataset.iid_field: number.view(-1).to(self.config["device"])}
            )
        )
        for begin in range(0, len(pairs), size):
            parts.append(self.model.predict(pairs[begin : begin + size]).view(-1).cpu())
        return torch.cat(parts).view(number.shape).float().numpy()

    def _interaction(self, users, split):
        """What RecBole's own evaluation gives the model, but padding for the held-out item and DIEN's negatives, which are
        looked up and do not count. A general model knows users by their number."""
        fields = {self.dataset.uid_field: torch.from_numpy(self._user_number[users])}
        fields[self.dataset.iid_field] = torch.zeros(len(users), dtype=torch.int64)
        if self._sequential:
            longest = self.config["MAX_ITEM_LIST_LENGTH"]
            items_BT, lengths_B = self.handed.padded(users, SPLITS[split], longest)
            number_BT = np.where(
                np.arange(longest) < lengths_B[:, None], self._item_number[items_BT], 0
            )
            items = self.dataset.iid_field + self.config["LIST_SUFFIX"]
            fields[items] = torch.from_numpy(number_BT)
            fields[self.config["NEG_PREFIX"] + items] = torch.zeros_like(fields[items])
            fields[self.config["ITEM_LIST_LENGTH_FIELD"]] = torch.from_numpy(lengths_B)
        return self._transform(self.dataset, Interaction(fields)).to(
            self.config["device"]
        )


def _numbers(token_id, count):
    """RecBole's numbers of 0 … count − 1, int64; 0, its padding, where it has none."""
    return np.array([token_id.get(str(number), 0) for number in range(count)], np.int64)
