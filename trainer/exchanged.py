"""Whether items belong to the users who have them: a held-out item is ranked higher for its own user than for another's.

Logs whose items have been mixed up keep their popularity, and a model that knows what is popular when ranks them nearly as well
as before. What it cannot do is tell one user's item from another's.
"""

import numpy as np
import torch
import torch.distributed as dist

from trainer.best import best_model
from trainer.data.random import permutation
from trainer.evaluate import evaluate_split, figures
from trainer.log import HEADLINE

_MOST = 20_000  # users; a hundred rows are kept of each
_CHOICE, _EXCHANGE = 11, 12  # separate the uses of one seed


def own_item_gains(run, config, dataset, ranks, users, least) -> list[float | None]:
    """By domain: NDCG@10 of held-out test items for their own users, less that of the same items for one another's users, over
    the same drawn candidates. Called on all ranks.

    users: the numbers of those to be looked at; of many, some at random. None for a domain where fewer than `least` are left.
    """
    chosen_K = np.sort(np.asarray(users)[permutation(len(users), config.seed, _CHOICE)[:_MOST]])
    model, table, _ = best_model(run, config, dataset, ranks)
    domain_K, rows_KC = _candidates(model, table, config, dataset, ranks, chosen_K)
    given, gains = {}, []
    for number in range(len(dataset.domains)):
        (own,) = np.nonzero(domain_K == number)
        if len(own) < max(2, least):
            continue
        own = own[permutation(len(own), config.seed, _EXCHANGE, number)]
        for one, other in zip(own, np.roll(own, 1), strict=True):
            rows, item = rows_KC[one], rows_KC[other, 0]
            rows = rows[rows >= 0]
            given[int(chosen_K[one])] = number, rows, np.append(item, rows[1:][rows[1:] != item])
    histograms = [_histogram(model, table, config, dataset, ranks, given, which) for which in (1, 2)]
    for number in range(len(dataset.domains)):
        own, others = (figures(histogram[number])[HEADLINE] for histogram in histograms)
        gains.append(None if own is None else own - others)
    return gains


def _candidates(model, table, config, dataset, ranks, chosen_K):
    """The domain of each chosen user's test item, −1 of those without one, and the rows that are ranked, the item's first."""
    found_KC = torch.full((len(chosen_K), 2 + config.evaluation.negatives), -1, dtype=torch.int64)

    def visit(candidates, ranks_B, scores_C):
        starts_B = np.cumsum(candidates.counts_B) - candidates.counts_B
        place_B = np.searchsorted(chosen_K, candidates.user_B)
        for user, place in enumerate(place_B):
            if place < len(chosen_K) and chosen_K[place] == candidates.user_B[user]:
                rows = candidates.rows_C[starts_B[user] : starts_B[user] + candidates.counts_B[user]]
                found_KC[place, 0] = int(candidates.domain_B[user])
                found_KC[place, 1 : 1 + len(rows)] = torch.from_numpy(rows)

    evaluate_split(model, table, dataset, ranks, config, "test", visit=visit)
    dist.all_reduce(found_KC, op=dist.ReduceOp.MAX)  # each user is one rank's
    return found_KC[:, 0].numpy(), found_KC[:, 1:].numpy()


def _histogram(model, table, config, dataset, ranks, given, which):
    given = {user: (of[0], of[which]) for user, of in given.items()}
    return evaluate_split(model, table, dataset, ranks, config, "test", given=given).histogram[0]
