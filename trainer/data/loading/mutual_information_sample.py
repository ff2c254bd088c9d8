"""The sample of SC-MIM: which users of a batch stand for all of them in the mutual information.

It is drawn from counters, and so the same at any number of ranks. An example: four users, two
domains, `count` = 2, of which this rank has users 7 and 9.

    users_U      [3,      7,      5,      9]
    lengths_UD   [[2, 1], [4, 0], [0, 3], [1, 1]]
    drawn order  9, 5, 7, 3
    domain 0     [9, 7]      user 5 has nothing of it
    domain 1     [9, 5]      user 7 neither
    number_B     [7, 9]

    slot_C       [2, 0, 3]   row in number_B · 2 + domain:  9 and 7 in domain 0, 9 in domain 1
    place_C      [0, 1, 2]   domain · count + position:     positions 0 and 1, then position 0
"""

import numpy as np
import torch

from syncrec.batch.views import Candidates
from trainer.data.counter_rng import RandomStream, random_bits


def draw_candidates(
    seed: int,
    epoch: int,
    step: int,
    users_U: np.ndarray,
    lengths_UD: np.ndarray,
    number_B: np.ndarray,
    count: int,
) -> Candidates:
    """A rank's part of `count` users of a step's global batch for each domain.

    Of a domain that fewer users have, all of these are taken.

    users_U: numbers of the users of the batch, of all ranks. lengths_UD: how many interactions of
    the training part each has in each domain. number_B: this rank's users, in the order of its
    batch.
    """
    domains = lengths_UD.shape[1]
    bits_U = random_bits(
        seed, RandomStream.MUTUAL_INFORMATION_SAMPLE, epoch, step, users_U
    )
    order_U = np.argsort(bits_U, kind="stable")
    row_of_user = {user: row for row, user in enumerate(number_B.tolist())}
    slots = []
    places = []
    for domain in range(domains):
        has_domain = lengths_UD[order_U, domain] > 0
        sample = users_U[order_U[has_domain][:count]]
        positions = np.flatnonzero(np.isin(sample, number_B))
        users = sample[positions].tolist()
        rows = np.array([row_of_user[user] for user in users], np.int64)
        slots.append(rows * domains + domain)
        places.append(domain * count + positions)
    slot_C = np.concatenate(slots)
    place_C = np.concatenate(places)
    return Candidates(
        size=count,
        slot_C=torch.from_numpy(slot_C),
        place_C=torch.from_numpy(place_C),
    )
