"""Negative sampling: negative items drawn from counters.

They depend on the user (or the step), never on the rank or on what was drawn before. An example:
two domains with items at the rows 0–4 and 8–11, so starts_D = [0, 8] and items_D = [5, 4].

    user_N         7        7        3            users of three targets
    position_N     0        1        0            of the target in the user's history
    items_N        0        9        3            rows of the targets
    domain_N       0        1        0

    draw_target_negatives(…, count=2)    [[3, 4], [8, 11], [0, 1]]    of the target's domain, not it
    draw_shared_negatives(…, count=3)    [[4, 0, 2], [8, 10, 10]]      a row of them for each domain
"""

from collections.abc import Sequence

import numpy as np

from trainer.data.counter_rng import RandomStream, random_below, random_bits


def draw_target_negatives(
    seed: int,
    epoch: int,
    user_N: np.ndarray,
    position_N: np.ndarray,
    items_N: np.ndarray,
    domain_N: np.ndarray,
    starts_D: np.ndarray,
    items_D: np.ndarray,
    count: int,
    drawn_rows: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Each interaction's own negatives: int64 (N, count) rows.

    user_N, position_N: user number and position in the user's history. items_N: the target's row.
    starts_D, items_D: first row and number of items of each domain. drawn_rows: of each domain the
    rows, rising, that alone are drawn from, items_D of them and the targets' among them; None: all.
    """
    bits = random_bits(
        seed,
        RandomStream.TARGET_NEGATIVES,
        epoch,
        user_N[:, None],
        position_N[:, None],
        np.arange(count)[None, :],
    )
    if drawn_rows is not None:
        return _draw_from_rows(bits, items_N, domain_N, drawn_rows)
    start_N = starts_D[domain_N]
    other_items_N = items_D[domain_N] - 1
    drawn = random_below(bits, other_items_N[:, None])
    target = (items_N - start_N)[:, None]
    # What is drawn counts the domain's items without the target.
    passes_target = drawn >= target
    return start_N[:, None] + drawn + passes_target


def _draw_from_rows(
    bits: np.ndarray,
    items_N: np.ndarray,
    domain_N: np.ndarray,
    drawn_rows: Sequence[np.ndarray],
) -> np.ndarray:
    """`draw_target_negatives` from given rows of each domain. bits: uint64 (N, count).

    Of a domain whose rows are 2, 5 and 7, the targets 5 and 7:

        drawn      [[0, 1], [1, 0]]    among the rows without the target
        returns    [[2, 7], [5, 2]]
    """
    rows_Nn = np.zeros(bits.shape, np.int64)
    for domain, rows in enumerate(drawn_rows):
        in_domain_N = domain_N == domain
        place_N = np.searchsorted(rows, items_N[in_domain_N])
        drawn = random_below(bits[in_domain_N], np.array(len(rows) - 1))
        passes_target = drawn >= place_N[:, None]
        # Of a single row there is no other.
        place_Nn = np.minimum(drawn + passes_target, len(rows) - 1)
        rows_Nn[in_domain_N] = rows[place_Nn]
    return rows_Nn


def draw_shared_negatives(
    seed: int,
    epoch: int,
    step: int,
    starts_D: np.ndarray,
    items_D: np.ndarray,
    count: int,
    drawn_rows: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Negatives that all targets of a domain share in one step: D int64 arrays of rows.

    A domain of at most `count` items gives all of them. drawn_rows: as for `draw_target_negatives`.
    """
    starts_D = np.asarray(starts_D)
    items_D = np.asarray(items_D)
    bits = random_bits(
        seed,
        RandomStream.SHARED_NEGATIVES,
        epoch,
        step,
        np.arange(len(starts_D))[:, None],
        np.arange(count),
    )
    drawn = random_below(bits, items_D[:, None])
    rows_of_domains = list(starts_D[:, None] + drawn)
    for domain in np.flatnonzero(items_D <= count).tolist():
        rows_of_domains[domain] = starts_D[domain] + np.arange(items_D[domain])
    if drawn_rows is None:
        return rows_of_domains
    pairs = zip(rows_of_domains, starts_D, drawn_rows, strict=True)
    return [rows[drawn - start] for drawn, start, rows in pairs]


def draw_evaluation_negatives(
    seed: int,
    user: int,
    touched: np.ndarray,
    start: int,
    items: int,
    count: int,
    drawn_rows: np.ndarray | None = None,
) -> np.ndarray:
    """`count` different rows of a domain that the user never touched: the candidates to rank.

    All of them where there are fewer. The draw depends on (seed, user) alone: validation, test and
    every system that is compared rank the same candidates. touched: the user's rows, any domain.
    drawn_rows: the domain's rows, rising, that alone are drawn from; None: all.
    """
    if drawn_rows is not None:
        # A few searches, not a pass over the domain's items for each user.
        place = np.searchsorted(drawn_rows, touched)
        (inside,) = np.nonzero(place < len(drawn_rows))
        place = place[inside]
        place = place[drawn_rows[place] == touched[inside]]
        drawn = draw_evaluation_negatives(
            seed, user, place, 0, len(drawn_rows), count
        )
        return drawn_rows[drawn]
    in_domain = (touched >= start) & (touched < start + items)
    touched = np.unique(touched[in_domain] - start)
    if items - len(touched) <= count:
        untouched = np.setdiff1d(np.arange(items), touched, assume_unique=True)
        return start + untouched
    if items <= 8 * count:
        drawn = _draw_from_few(seed, user, touched, items, count)
    else:
        drawn = _draw_from_many(seed, user, touched, items, count)
    return start + drawn


def _draw_from_few(
    seed: int,
    user: int,
    touched: np.ndarray,
    items: int,
    count: int,
) -> np.ndarray:
    """The first untouched items of a random order of all."""
    keys = random_bits(
        seed, RandomStream.EVALUATION_CANDIDATES, user, np.arange(items)
    )
    keys[touched] = np.iinfo(np.uint64).max
    order = np.argsort(keys, kind="stable")
    return order[:count]


def _draw_from_many(
    seed: int,
    user: int,
    touched: np.ndarray,
    items: int,
    count: int,
) -> np.ndarray:
    """The first different untouched items of a sequence of draws (rejection sampling)."""
    draws = 2 * count
    while True:
        numbers = np.arange(draws)
        bits = random_bits(
            seed, RandomStream.EVALUATION_CANDIDATES, user, numbers
        )
        drawn = random_below(bits, items)
        drawn = drawn[~np.isin(drawn, touched)]
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= count:
            first = np.sort(first)
            return drawn[first[:count]]
        draws *= 2
