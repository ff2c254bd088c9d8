"""Which users of a batch stand for all of them in SC-MIM: drawn from counters, and so the same at any number of ranks."""

import numpy as np
import torch

from syncrec.batch.build import Candidates
from trainer.data.counter_rng import RandomStream, random_bits


def draw_candidates(
    seed, epoch, step, users_U, lengths_UD, number_B, count
) -> Candidates:
    """A rank's part of `count` users of a step's global batch for each domain, or of all that have the domain where there
    are fewer.

    users_U: numbers of the users of the batch, of all ranks; lengths_UD: how many interactions of the training part each has
    in each domain. number_B: this rank's own, in the order of its batch.
    """
    domains = lengths_UD.shape[1]
    order_U = np.argsort(
        random_bits(seed, RandomStream.MUTUAL_INFORMATION_SAMPLE, epoch, step, users_U),
        kind="stable",
    )
    row_of = {number: row for row, number in enumerate(number_B.tolist())}
    slots = []
    places = []
    for domain in range(domains):
        with_domain = order_U[lengths_UD[order_U, domain] > 0][:count]
        own = np.flatnonzero(np.isin(users_U[with_domain], number_B))
        rows = np.array(
            [row_of[number] for number in users_U[with_domain[own]].tolist()], np.int64
        )
        slots.append(rows * domains + domain)
        places.append(domain * count + own)
    return Candidates(
        size=count,
        slot_C=torch.from_numpy(np.concatenate(slots)),
        place_C=torch.from_numpy(np.concatenate(places)),
    )
