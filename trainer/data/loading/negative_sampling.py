"""Negative items, drawn from counters: they depend on the user (or the step), never on the rank or its history."""

import numpy as np

from trainer.data.counter_rng import RandomStream, random_below, random_bits


def target_negatives(
    seed, epoch, user_N, position_N, items_N, domain_N, starts_D, items_D, count
):
    """Each interaction's own negatives: int64 (N, count) rows.

    user_N, position_N: user number and place in the user's history; items_N: the target's row; starts_D, items_D: first
    row and number of items of each domain.
    """
    bits = random_bits(
        seed,
        RandomStream.TARGET_NEGATIVES,
        epoch,
        user_N[:, None],
        position_N[:, None],
        np.arange(count)[None, :],
    )
    others = random_below(bits, (items_D[domain_N] - 1)[:, None])
    target = (items_N - starts_D[domain_N])[:, None]
    return starts_D[domain_N][:, None] + others + (others >= target)


def shared_negatives(seed, epoch, step, starts_D, items_D, count):
    """Negatives that all targets of a domain share in one step: a list of D int64 arrays of rows."""
    bits = random_bits(
        seed,
        RandomStream.SHARED_NEGATIVES,
        epoch,
        step,
        np.arange(len(starts_D))[:, None],
        np.arange(count),
    )
    drawn = np.asarray(starts_D)[:, None] + random_below(
        bits, np.asarray(items_D)[:, None]
    )
    few = [
        start + np.arange(items) if items <= count else None
        for start, items in zip(starts_D, items_D, strict=True)
    ]
    return [rows if own is None else own for rows, own in zip(drawn, few, strict=True)]


def evaluation_negatives(seed, user, touched, start, items, count):
    """`count` different rows of a domain that the user never touched, or all of them where there are fewer.

    touched: the user's rows, any domain. Depends on (seed, user) alone: validation, test and every system that is
    compared rank the same candidates.
    """
    own = np.unique(touched[(touched >= start) & (touched < start + items)] - start)
    if items - len(own) <= count:
        return start + np.setdiff1d(np.arange(items), own, assume_unique=True)
    if items <= 8 * count:
        keys = random_bits(
            seed, RandomStream.EVALUATION_CANDIDATES, user, np.arange(items)
        )
        keys[own] = np.iinfo(np.uint64).max
        return start + np.argsort(keys, kind="stable")[:count]
    draws = 2 * count
    while True:
        drawn = random_below(
            random_bits(
                seed, RandomStream.EVALUATION_CANDIDATES, user, np.arange(draws)
            ),
            items,
        )
        drawn = drawn[~np.isin(drawn, own)]
        first = np.sort(np.unique(drawn, return_index=True)[1])
        if len(first) >= count:
            return start + drawn[first[:count]]
        draws *= 2
