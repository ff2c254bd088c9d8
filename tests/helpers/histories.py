"""Histories to test with: drawn at random with every awkward case in them, and packed as a loader would."""

from dataclasses import replace

import numpy as np

from syncrec.batch.build import build_batch, trim
from syncrec.batch.views import move
from tests.helpers.reference import History


def draw(
    seed, domain_items, users=7, longest=12, negatives=2, absent_domain=None
):
    """Histories around a view length of 4 or 5: cut and uncut ones, a user without any interaction, one with a single
    one, weight-zero users. Rows of M: domain after domain. absent_domain: a domain that nobody touches."""
    rng, clock = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    starts = np.cumsum(domain_items) - domain_items
    touched = [d for d in range(len(domain_items)) if d != absent_domain]
    popularity = rng.dirichlet(
        np.ones(len(touched))
    )  # uneven: many users lack some domain
    lengths = [1, 0, longest, *rng.integers(1, longest + 1, users - 3)]
    weights = rng.permutation([0, 0, *[1] * (users - 2)])
    histories = []
    for length, weight in zip(lengths, weights, strict=True):
        domains = rng.choice(touched, length, p=popularity)
        items = starts[domains] + rng.integers(
            0, np.array(domain_items)[domains]
        )
        pairs = zip(domains, items, strict=True)
        own = [
            _others(rng, starts[d], domain_items[d], item, negatives)
            for d, item in pairs
        ]
        ticks = np.sort(
            clock.choice(
                [0, 3, 700, 65535, *clock.integers(0, 65536, 4)], length
            )
        )  # some at once, or long after
        histories.append(
            History(
                items.tolist(),
                domains.tolist(),
                int(weight),
                own,
                ticks.tolist(),
            )
        )
    return [histories[user] for user in rng.permutation(users)]


def draw_shared(seed, domain_items, count):
    """Shared negatives, drawn with replacement, so that targets and repeats are among them."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(domain_items) - domain_items
    return [
        start + rng.integers(0, items, count)
        for start, items in zip(starts, domain_items, strict=True)
    ]


def _others(rng, start, items, item, count):
    others = [row for row in range(start, start + items) if row != item]
    return rng.choice(
        others or [item], count
    ).tolist()  # alone in its domain: only shared negatives make sense


def without_newest(histories):
    """What a user had before the newest interaction."""
    parts = ("items", "domains", "negatives", "ticks")
    return [
        replace(
            history, **{part: getattr(history, part)[:-1] for part in parts}
        )
        for history in histories
    ]


def ticks_of(histories):
    """When the interactions of `flatten` were, int64 (N,)."""
    return np.array(
        [tick for history in histories for tick in history.ticks], np.int64
    )


def flatten(histories):
    """Users' histories as the jagged arrays of `build_batch`: items_N, lengths_B, domain_N, weight_B, negatives_Nn."""
    items_N = np.array(
        [item for history in histories for item in history.items], np.int64
    )
    lengths_B = np.array(
        [len(history.items) for history in histories], np.int64
    )
    domain_N = np.array(
        [domain for history in histories for domain in history.domains],
        np.int64,
    )
    weight_B = np.array([history.weight for history in histories])
    own = [
        negatives for history in histories for negatives in history.negatives
    ]
    return (
        items_N,
        lengths_B,
        domain_N,
        weight_B,
        np.array(own, np.int64).reshape(len(items_N), -1 if own else 0),
    )


def pack(
    histories,
    domain_items,
    max_length,
    pooling="mean",
    shared_negatives=None,
    accumulation=1,
):
    """The packed batch of trimmed histories, and the (user, step) of each of its interactions."""
    items_N, lengths_B, domain_N, weight_B, negatives_Nn = flatten(histories)
    kept, lengths_B, domain_N = trim(
        np.arange(len(items_N)), lengths_B, domain_N, max_length
    )
    keys = [
        (user, step)
        for user, history in enumerate(histories)
        for step in range(len(history.items))
    ]
    negatives = (
        negatives_Nn[kept] if shared_negatives is None else shared_negatives
    )
    ticks_N = ticks_of(histories)[kept]
    batch = build_batch(
        items_N[kept],
        lengths_B,
        domain_N,
        weight_B,
        negatives,
        domain_items,
        max_length,
        pooling,
        ticks_N,
        accumulation,
    )
    return move(batch, "cpu"), [keys[place] for place in kept]
