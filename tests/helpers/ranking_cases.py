"""What is ranked in test_ranking.py, and what NumPy makes of it, all at once."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Case:
    """A table m_NR, its domain [first, first + items), users, the item of each whose rank is asked for, and who has them.

    excluded: None, or rows by user. owners: "dealt", or the only "first" or "last" rank. ranked_N: the items that are ranked.
    """

    m_NR: np.ndarray
    y_BR: np.ndarray
    first: int
    items: int
    row_B: np.ndarray
    excluded: list | None = None
    k: int = 10
    block: int = 16
    users: int = 7
    owners: str = "dealt"
    ranked_N: np.ndarray | None = None

    def owner(self, ranks):
        """The rank of each user."""
        place_B = np.arange(len(self.y_BR))
        return {
            "dealt": place_B % ranks,
            "first": 0 * place_B,
            "last": 0 * place_B + ranks - 1,
        }[self.owners]


def scores_of(case):
    """The score of every user and item of the domain, by the definition: float64 products of float32 numbers summed in halves,
    rounded."""
    items_NR = case.m_NR[case.first : case.first + case.items].astype(
        np.float64
    )
    with np.errstate(all="ignore"):
        terms = case.y_BR.astype(np.float64)[:, None] * items_NR
        while (width := terms.shape[2]) > 1:
            half = width // 2
            rest = terms[..., 2 * half :]
            terms = terms[..., :half] + terms[..., half : 2 * half]
            terms[..., : rest.shape[2]] += rest
        return terms[..., 0].astype(np.float32)


def brute_force(case):
    """{"rows", "scores", "ranks"} from all scores."""
    scores_BN = scores_of(case)
    rows_N = np.arange(case.first, case.first + case.items)
    rows, scores = (
        np.full((len(scores_BN), case.k), -1),
        np.full((len(scores_BN), case.k), -np.inf, np.float32),
    )
    ranks = np.zeros(len(scores_BN), np.int64)
    for user, scores_N in enumerate(scores_BN):
        left_N = (
            ~np.isin(rows_N, case.excluded[user])
            if case.excluded is not None
            else np.ones(case.items, bool)
        )
        if case.ranked_N is not None:
            left_N = left_N & case.ranked_N
        counted_N = np.where(np.isnan(scores_N), np.float32(-np.inf), scores_N)
        order = np.lexsort([rows_N[left_N], -counted_N[left_N]])[: case.k]
        rows[user, : len(order)], scores[user, : len(order)] = (
            rows_N[left_N][order],
            counted_N[left_N][order],
        )
        own_N = rows_N == case.row_B[user]
        ranks[user] = (
            1 + (left_N & ~own_N & ~(scores_N < scores_N[own_N])).sum()
        )
    return {"rows": rows, "scores": scores, "ranks": ranks}


def made(
    seed,
    rows=253,
    dim=12,
    users=23,
    first=0,
    items=None,
    spoil=lambda m_NR, random: None,
    had=None,
    **more,
):
    """A case with normal vectors. spoil(m_NR, random) changes them; had: excluded rows of each user, drawn from all."""
    random = np.random.default_rng(seed)
    items = rows - first if items is None else items
    m_NR, y_BR = (
        random.normal(size=(rows, dim)).astype(np.float32),
        random.normal(size=(users, dim)).astype(np.float32),
    )
    spoil(m_NR, random)
    excluded = (
        None
        if had is None
        else [random.integers(0, rows, had).tolist() for _ in range(users)]
    )
    return Case(
        m_NR,
        y_BR,
        first,
        items,
        random.integers(first, first + items, users),
        excluded,
        **more,
    )


def _copies(m_NR, random):
    m_NR[:] = m_NR[random.integers(0, 40, len(m_NR))]


def _almost_equal(m_NR, random):
    """Rows whose scores float32 products confuse: the same one, with the last bits of a few entries changed."""
    m_NR[:] = m_NR[0]
    bits = m_NR.view(np.int32)
    bits += random.integers(-2, 3, bits.shape, np.int32) * (
        random.random(bits.shape) < 0.2
    )


def _equal(m_NR, random):
    m_NR[:] = m_NR[0]


def _zeros(m_NR, random):
    m_NR[:] = 0


def _wild(m_NR, random):
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e25, 1e-40):
        m_NR[
            random.integers(0, len(m_NR), 9),
            random.integers(0, m_NR.shape[1], 9),
        ] = value
    m_NR[random.integers(0, len(m_NR), 5)] = np.nan


def _spread(m_NR, random):
    m_NR *= np.exp(4 * random.normal(size=(len(m_NR), 1))).astype(np.float32)


def _wild_users(case):
    y_BR = case.y_BR.copy()
    y_BR[0], y_BR[1, 3], y_BR[2, 5], y_BR[3], y_BR[4], y_BR[5] = (
        np.nan,
        np.nan,
        np.inf,
        0,
        3e38,
        1e-40,
    )
    y_BR[6, 2], y_BR[7] = -np.inf, y_BR[8]
    return replace(case, y_BR=y_BR)


_all_had = made(12, rows=203, first=20, items=100)
CASES = {
    "plain": made(1),
    "one_part": made(2, block=64, users=100),
    "middle": made(3, first=60, items=170, had=30),
    "other_width": made(4, dim=36, had=100),
    "copies": made(5, spoil=_copies, had=30),
    "almost_equal": made(6, spoil=_almost_equal, had=20),
    "equal": made(7, spoil=_equal, had=200),
    "zeros": made(8, spoil=_zeros, had=40),
    "wild": made(9, spoil=_wild, had=60),
    "wild_users": _wild_users(
        made(10, spoil=_wild, had=20, first=100, items=140, k=5)
    ),
    "wild_users_of_good_items": _wild_users(made(11, had=20, k=40)),
    "spread": made(13, spoil=_spread),
    "all_had": replace(
        _all_had,
        excluded=[list(range(203)) * 2, list(range(20, 118))] * 11 + [[]],
    ),
    "few_items": made(14, first=200, items=6, had=300, k=9),
    "one_item": made(15, first=200, items=1, k=3),
    "more_than_all": made(16, first=200, items=50, had=200, k=60, block=4),
    "more_than_a_block": made(17, k=100, had=10),
    "on_the_first": made(18, owners="first", had=10),
    "on_the_last": made(19, owners="last", had=10),
    "nobody": made(20, users=0, had=3),
    "one_user": made(21, users=1),
    "every_third": made(
        22,
        first=60,
        items=170,
        had=30,
        ranked_N=np.arange(170) % 3 == 0,
    ),
}
