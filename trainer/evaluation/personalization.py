"""Whether items belong to the users who have them: a held-out item is ranked higher for its own user than for another's.

Logs whose items have been mixed up keep their popularity, and a model that knows what is popular when ranks them nearly as well
as before. What it cannot do is tell one user's item from another's.
"""

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.counter_rng import RandomStream, permutation, random_bits
from trainer.evaluation.sampled import evaluate_split, figures
from trainer.reporting.run_log import HEADLINE

_MOST = 20_000  # users; a hundred rows are kept of each


class DrawnUsers:
    """Some of the users that are ranked, with what their test item was ranked among: what `own_item_gains` asks for.

    It sees what ranking visits, so that nobody is ranked a second time. wanted_U: whether a user may be chosen; of many, some
    are, at random. At most _MOST users are held.
    """

    def __init__(self, config, wanted_U):
        self.seed = config.seed
        self.wanted_U = wanted_U
        self._width = 1 + config.evaluation.negatives
        self._key_K = np.zeros(0, np.uint64)
        self._facts_K3 = np.zeros((0, 3), np.int64)  # user, domain, rank
        self._rows_KC = np.zeros((0, self._width), np.int64)

    def visit(self, candidates, ranks_B, _scores_C=None):
        """As `rank_candidates` calls it."""
        (chosen,) = np.nonzero(candidates.user_B >= 0)
        chosen = chosen[self.wanted_U[candidates.user_B[chosen]]]
        key_B = random_bits(
            self.seed, RandomStream.PERSONALIZATION_SAMPLE, candidates.user_B[chosen]
        )
        if len(self._key_K) == _MOST:
            nearer_B = key_B < self._key_K[-1]
            chosen = chosen[nearer_B]
            key_B = key_B[nearer_B]
        if not len(chosen):
            return
        rows_BC = np.full((len(chosen), self._width), -1, np.int64)
        starts_B = np.cumsum(candidates.counts_B) - candidates.counts_B
        for place, user in enumerate(chosen):
            count = candidates.counts_B[user]
            rows_BC[place, :count] = candidates.rows_C[
                starts_B[user] : starts_B[user] + count
            ]
        facts = candidates.user_B[chosen], candidates.domain_B[chosen], ranks_B[chosen]
        # Those with the smallest keys, which depend on the seed and the user.
        key_K = np.append(self._key_K, key_B)
        order = np.argsort(key_K, kind="stable")[:_MOST]
        self._key_K = key_K[order]
        self._facts_K3 = np.concatenate([self._facts_K3, np.stack(facts, axis=1)])[
            order
        ]
        self._rows_KC = np.concatenate([self._rows_KC, rows_BC])[order]

    def gathered(self):
        """Of all ranks, by user: (users, domains, ranks, rows, the user's own item's first), int64. Called on all ranks."""
        counts_W = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        counts_W[dist.get_rank()] = len(self._key_K)
        dist.all_reduce(counts_W)
        first = int(counts_W[: dist.get_rank()].sum())
        own = slice(first, first + len(self._key_K))
        together = torch.zeros(int(counts_W.sum()), 4, dtype=torch.int64)
        together[own, 0] = torch.from_numpy(self._key_K.view(np.int64))
        together[own, 1:] = torch.from_numpy(self._facts_K3)
        dist.all_reduce(together)  # each line is one rank's
        key_K = together[:, 0].numpy().astype(np.uint64)
        facts_K3 = together[:, 1:].numpy()
        chosen = np.argsort(key_K, kind="stable")[:_MOST]
        chosen = chosen[np.argsort(facts_K3[chosen, 0])]
        rows_KC = torch.zeros(len(chosen), self._width, dtype=torch.int64)
        (mine,) = np.nonzero((chosen >= own.start) & (chosen < own.stop))
        rows_KC[torch.from_numpy(mine)] = torch.from_numpy(
            self._rows_KC[chosen[mine] - own.start]
        )
        dist.all_reduce(rows_KC)
        return *facts_K3[chosen].T, rows_KC.numpy()


def own_item_gains(
    model, table, config, dataset, ranks, drawn: DrawnUsers, least
) -> list[float | None]:
    """By domain: NDCG@10 of held-out test items for their own users, less that of the same items for one another's users, over
    the same drawn candidates. Called on all ranks.

    drawn: has seen these users ranked by the model. None for a domain where fewer than `least` of them are left.
    """
    user_K, domain_K, rank_K, rows_KC = drawn.gathered()
    exchanged = {}
    gains = []
    histogram_DR = np.zeros((len(dataset.domains), rows_KC.shape[1]), np.int64)
    for number in range(len(dataset.domains)):
        (own,) = np.nonzero(domain_K == number)
        if len(own) < max(2, least):
            continue
        histogram_DR[number] = np.bincount(rank_K[own] - 1, minlength=rows_KC.shape[1])
        own = own[
            permutation(
                len(own), config.seed, RandomStream.PERSONALIZATION_EXCHANGE, number
            )
        ]
        for one, other in zip(own, np.roll(own, 1), strict=True):
            rows, item = rows_KC[one], rows_KC[other, 0]
            rows = rows[rows >= 0]
            exchanged[int(user_K[one])] = (
                number,
                np.append(item, rows[1:][rows[1:] != item]),
            )
    ranking = evaluate_split(
        model, table, dataset, ranks, config, "test", given=exchanged
    )
    for number in range(len(dataset.domains)):
        own, others = (
            figures(histogram[number])[HEADLINE]
            for histogram in (histogram_DR, ranking.histogram[0])
        )
        gains.append(None if own is None else own - others)
    return gains
