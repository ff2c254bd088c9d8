"""The baseline by popularity: items ranked by their interactions in the training part.

A user's held-out item is compared with the same items as by the model. Many items are equally
popular, and counting all of those against the held-out item would make a baseline that is weaker
than it is. So an order that is drawn from the seed breaks ties: among drawn candidates an order of
the user's candidates, among all items of a domain an order of these for the user.
"""

import numpy as np

from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.data.format.dataset import Dataset
from trainer.data.format.vocabulary import read_item_counts
from trainer.evaluation.metrics import drawn_positions

HEAD, MIDDLE, TAIL = range(3)  # thirds of a domain's interactions


def candidate_scores(
    counts_N: np.ndarray,
    seed: int,
    user_B: np.ndarray,
    counts_B: np.ndarray,
    rows_C: np.ndarray,
) -> np.ndarray:
    """Popularity's score of each candidate, float64 (C,).

    It is the candidate's training interactions, and a fraction drawn from (seed, user, item).
    counts_N: by row of M, as `item_counts` gives them. user_B, counts_B, rows_C: jagged, as
    `Candidates` has them. Two users, the second one's candidates equally popular:

        user_B      12              40
        counts_B    3               2
        rows_C      4   9   2       51   60
        scores      7.3 2.8 5.1     3.4  3.9
    """
    user_C = np.repeat(user_B, counts_B)
    bits_C = random_bits(seed, RandomStream.POPULARITY_TIES, user_C, rows_C)
    interactions_C = counts_N[rows_C]
    return interactions_C + random_unit(bits_C)


def break_ties(
    value_C: np.ndarray,
    seed: int,
    user_B: np.ndarray,
    counts_B: np.ndarray,
    rows_C: np.ndarray,
) -> np.ndarray:
    """Scores in the order of any values, ties by the order that `candidate_scores` draws: int64 (C,).

    The other arguments are those of `candidate_scores`. Two users, the second one's candidates of
    equal value:

        user_B      12               40
        counts_B    3                2
        value_C     0.5 2.5 0.1      1.0 1.0
        scores      1   4   0        3   2
    """
    user_C = np.repeat(user_B, counts_B)
    bits_C = random_bits(seed, RandomStream.POPULARITY_TIES, user_C, rows_C)
    rising = np.lexsort((bits_C, value_C))
    score_C = np.zeros(len(rising), np.int64)
    score_C[rising] = np.arange(len(rising))
    return score_C


def _thirds(descending: np.ndarray) -> np.ndarray:
    """HEAD, MIDDLE or TAIL of a domain's items, by their interactions, most popular first.

    An item without interactions is of the TAIL. Of 18 interactions:

        descending    6    3    3    2     2     2     0
        before        0    6    9    12    14    16    18
        third         0    1    1    2     2     2     2
    """
    total = max(1, descending.sum())
    # The interactions of more popular items.
    before = np.cumsum(descending) - descending
    third = 3 * before // total
    third = np.minimum(TAIL, third)
    return np.where(descending > 0, third, TAIL)


class Popularity:
    """Ranks held-out items among all items of their domain by training interactions.

    counts_N: interactions of each row of M. third_N: int8, HEAD for the most popular items that
    have a third of their domain's interactions, MIDDLE for the next, TAIL for the rest.

        interactions of a domain's items    6    3    3    2    2    2    0
        third                               0    1    1    2    2    2    2
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.counts_N = read_item_counts(dataset)
        self.third_N = np.full(dataset.num_embeddings, TAIL, np.int8)
        self._ascending: list[np.ndarray] = []  # counts of each domain
        for domain in dataset.domains:
            end = domain.start + domain.items
            counts = self.counts_N[domain.start : end]
            order = np.argsort(-counts, kind="stable")
            descending = counts[order]
            self.third_N[domain.start + order] = _thirds(descending)
            is_ranked_N = dataset.is_trained(domain.start + order)
            self._ascending.append(descending[is_ranked_N][::-1])

    def positions(
        self,
        user_B: np.ndarray,
        domain_B: np.ndarray,
        row_B: np.ndarray,
        counts_B: np.ndarray,
        rows_E: np.ndarray,
    ) -> np.ndarray:
        """The position of each user's held-out item, int64 (B,), with ties by a drawn order.

        domain_B, row_B: of the held-out item. counts_B, rows_E: the other items of the user's
        history, jagged, which are not compared. Four users of two domains, domain 1 from row 50:

            user_B      12     40          7    31
            domain_B    0      1           1    0
            row_B       4      51          58   9
            counts_B    2      3           1    2
            rows_E      2 55   60 60 3     61   9 17
        """
        count_B = self.counts_N[row_B].astype(np.int64)
        greater_B = np.zeros_like(count_B)
        equal_B = np.zeros_like(count_B)
        for number, ascending in enumerate(self._ascending):
            in_domain_B = domain_B == number
            counts = count_B[in_domain_B]
            left = np.searchsorted(ascending, counts, side="left")
            right = np.searchsorted(ascending, counts, side="right")
            greater_B[in_domain_B] = len(ascending) - right
            equal_B[in_domain_B] = right - left
        equal_B -= self.dataset.is_trained(row_B)  # without itself
        index_B = np.arange(len(user_B))
        user_E = np.repeat(index_B, counts_B)
        user_E, row_E = unique_rivals(
            self.dataset, user_E, rows_E, domain_B, row_B
        )
        count_E = self.counts_N[row_E]
        greater_E = count_E > count_B[user_E]
        equal_E = count_E == count_B[user_E]
        greater_B -= np.bincount(user_E[greater_E], minlength=len(count_B))
        equal_B -= np.bincount(user_E[equal_E], minlength=len(count_B))
        return positions_with_ties(greater_B, equal_B, self.seed, user_B)


def positions_with_ties(
    greater_B: np.ndarray, equal_B: np.ndarray, seed: int, user_B: np.ndarray
) -> np.ndarray:
    """`drawn_positions` by the order that the seed draws for each user, int64 (B,)."""
    bits_B = random_bits(seed, RandomStream.POSITION_TIES, user_B)
    return drawn_positions(greater_B, equal_B, bits_B)


def unique_rivals(
    dataset: Dataset,
    user_E: np.ndarray,
    row_E: np.ndarray,
    domain_B: np.ndarray,
    row_B: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (user, row) of the held-out item's domain, each once, without that item.

    Those of items that are ranked (`Dataset.is_trained`).

    user_E: index of the user in the batch. Two users of domains 0 and 1, domain 1 from row 50:

        row_B     4        51
        row_E     2 55     60 60 3
        pairs     (0, 2)   (1, 60)
    """
    rows = dataset.num_embeddings
    pair_E = user_E * rows + row_E
    pair_E = np.unique(pair_E)
    user_E, row_E = np.divmod(pair_E, rows)
    domain_E = dataset.domain_of(row_E)
    same_domain_E = domain_E == domain_B[user_E]
    rival_E = same_domain_E & (row_E != row_B[user_E])
    rival_E &= dataset.is_trained(row_E)
    return user_E[rival_E], row_E[rival_E]
