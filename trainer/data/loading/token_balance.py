"""Which rank takes which user of a batch, so that all ranks have equally much to do.

A user starts on its home rank, whose shards hold it. Users are first moved until all ranks have equally many, then exchanged
between heavy and light ranks, one for one, until no rank has noticeably more than the mean: the slowest rank is what all wait
for. Every rank computes the same for the whole batch from the users' lengths, so nothing is sent.

A rank exchanges with few others, always the same: each of them costs its loaders a shard to open and a block to decode. With
2ᵏ ranks these are the k ranks whose numbers differ in one bit, and the batch is evened out bit after bit, the lowest first
("dimension exchange", Cybenko 1989). The first three bits are the neighbours of a host of eight. A user is exchanged once, so
a rank reads its own shards and those of these k.
"""

import numpy as np

_TOLERANCE = 0.0075  # how far above the mean of all a rank may stay
_OF_A_SET = 0.5  # of it: how far above the mean of a set of partners, of which there are several after each other
_ROUNDS = 32
_TRIED = 32  # users of a heavy rank that are considered in a round, from its longest to its shortest
_OFFERED = 24  # users of each rank that are enough to choose from
_MOST_OFFERED = 128  # more than these are sorted in vain, and lie in more blocks
_ABSENT, _NEVER = -1, np.iinfo(np.int64).max


def view_tokens(lengths_BD, max_length):
    """Tokens that each user brings into a step, both views together: int64 (B,); one more than `syncrec.batch.build` makes of it,
    the newest interaction being no input.

    lengths_BD: interactions of the training part by domain, of any integer dtype; max_length: tokens of a sequence at most.
    """
    lengths_BD = lengths_BD.astype(np.int32)
    cross_B = np.minimum(lengths_BD.sum(1), max_length)
    return cross_B + (np.minimum(lengths_BD + 1, max_length) * (lengths_BD > 0)).sum(1)


def equal_counts(home_B, world_size):
    """The rank of each user, int64 (B,): the home rank, but for those that it has too many of, which come last in the batch.

    Ranks have B / world_size users, rounded up on those that own the most, else down.
    """
    users = len(home_B)
    counts_W = np.bincount(home_B, minlength=world_size)
    room_W = np.full(world_size, users // world_size)
    room_W[np.argsort(-counts_W, kind="stable")[: users % world_size]] += 1
    rank_B = home_B.astype(np.int64)
    if (counts_W > room_W).any():
        order, place = _grouped(home_B, counts_W)
        too_many = order[
            place >= room_W[home_B[order]]
        ]  # home after home: a rank is given to by few
        rank_B[too_many] = np.repeat(
            np.arange(world_size), np.maximum(room_W - counts_W, 0)
        )
    return rank_B


def balanced(home_B, cost_B, world_size, turn_B=None):
    """The rank of each user, int64 (B,), so that ranks have equally many users and no rank's sum of `cost_B` is noticeably
    above the mean.

    home_B: the rank that each user's shard belongs to; cost_B: what it brings, see `view_tokens`; turn_B: which of its home's
    streams it is of, 0 first. Users of few streams are exchanged, if they suffice, and between few ranks, see `partners`: the
    ranks then share few blocks. The same on every machine.
    """
    rank_B = equal_counts(home_B, world_size)
    if world_size == 1 or len(home_B) <= world_size:
        return rank_B
    cost_B = cost_B.astype(np.int64)
    load_W = np.zeros(world_size, np.int64)
    np.add.at(load_W, rank_B, cost_B)
    limit = int(load_W.sum() / world_size * (1 + _TOLERANCE))
    offers = [np.arange(len(home_B))]
    if turn_B is not None:
        enough = -(
            -_OFFERED * world_size * (1 + int(turn_B.max())) // len(home_B)
        )  # streams a rank
        few = np.flatnonzero(turn_B < enough)
        offers = offers if len(few) == len(home_B) else [few, *offers]
    for offered in offers:
        offered = _first_of_each(rank_B, offered, world_size)
        for member_GS in partners(world_size):
            if load_W.max() <= limit:
                return rank_B
            mean_G = load_W[member_GS].mean(1)
            limit_G = (mean_G * (1 + _OF_A_SET * _TOLERANCE)).astype(np.int64)
            at_home = offered[rank_B[offered] == home_B[offered]]
            _exchange(rank_B, cost_B, load_W, member_GS, limit_G, at_home)
    everyone_GS = np.arange(world_size)[None]
    for offered in (
        offers
    ):  # where partners do not suffice: a few users in a long batch, or a very long one
        if load_W.max() > limit:
            _exchange(rank_B, cost_B, load_W, everyone_GS, np.array([limit]), offered)
    return rank_B


def partners(world_size: int) -> list[np.ndarray]:
    """Which ranks exchange users, stage after stage: int64 (G, S), G sets of S ranks each.

    Every rank is in one set of a stage. S is a prime factor of the number of ranks, the smallest first, and the numbers of a
    set's ranks differ in one digit: the first stages are of neighbours.

        6 ranks:  [[0, 1], [2, 3], [4, 5]]   then   [[0, 2, 4], [1, 3, 5]]
    """
    stages = []
    stride = 1
    factor = 2
    while stride < world_size:
        if world_size // stride % factor:
            factor += 1
            continue
        ranks = np.arange(world_size).reshape(-1, factor, stride)
        stages.append(np.moveaxis(ranks, 1, 2).reshape(-1, factor))
        stride *= factor
    return stages


def _exchange(rank_B, cost_B, load_W, member_GS, limit_G, offered):
    """Exchanges offered users within each set of ranks, changing `rank_B` and `load_W`, until no load of a set is above the
    set's limit."""
    world_size = len(load_W)
    sets, size = member_GS.shape
    counts_W = np.bincount(rank_B[offered], minlength=world_size)
    order, place = _grouped(rank_B[offered], counts_W)
    user_WM = np.full((world_size, counts_W.max()), _ABSENT)
    user_WM[rank_B[offered[order]], place] = offered[order]
    cost_WM = np.where(user_WM == _ABSENT, _ABSENT, cost_B[user_WM])
    mean_G = load_W[member_GS].sum(1) // size
    shift_G = np.zeros(sets, np.int64)
    pair = np.arange(size // 2)[None]
    for _ in range(_ROUNDS):
        load_GS = load_W[member_GS]
        by_load_GS = np.take_along_axis(
            member_GS, np.argsort(load_GS, axis=1, kind="stable"), 1
        )
        pairs_G = np.minimum((load_GS > limit_G[:, None]).sum(1), size // 2)
        tries_G = (pairs_G > 0) & (shift_G + 2 * pairs_G <= size)
        of_P, pair_P = np.nonzero(tries_G[:, None] & (pair < pairs_G[:, None]))
        if not len(of_P):
            break
        heavy = by_load_GS[of_P, size - 1 - pair_P]
        light = by_load_GS[of_P, shift_G[of_P] + pair_P]
        above, below = load_W[heavy] - mean_G[of_P], mean_G[of_P] - load_W[light]
        # The heavy rank's surplus goes over whole where the light rank has room for it: one exchange is then enough.
        room = below + limit_G[of_P] - mean_G[of_P]
        wanted = np.where(above <= room, above, (above + below) // 2)
        better, give, take = _best_exchange(
            cost_WM[heavy], cost_WM[light], wanted, above + below
        )
        shift_G[tries_G] += 1  # other partners,
        shift_G[of_P[better]] = 0  # unless these will do
        heavy, light, give, take = (
            heavy[better],
            light[better],
            give[better],
            take[better],
        )
        moved = cost_WM[heavy, give] - cost_WM[light, take]
        load_W[heavy] -= moved
        load_W[light] += moved
        for of_WM in (user_WM, cost_WM):
            of_WM[heavy, give], of_WM[light, take] = (
                of_WM[light, take],
                of_WM[heavy, give],
            )
    there_WM = user_WM != _ABSENT
    rank_B[user_WM[there_WM]] = np.nonzero(there_WM)[0]


def _first_of_each(rank_B, offered, world_size):
    """The offered users, of each rank the first in the batch."""
    order, place = _grouped(
        rank_B[offered], np.bincount(rank_B[offered], minlength=world_size)
    )
    return offered[order[place < _MOST_OFFERED]]


def _grouped(rank_B, counts_W):
    """Users sorted by rank, in the batch's order within it, and each one's place among its rank's."""
    narrow = (
        rank_B.astype(np.uint16) if len(counts_W) <= 2**16 else rank_B
    )  # which NumPy sorts by counting
    order = np.argsort(narrow, kind="stable")
    return order, np.arange(len(order)) - np.repeat(
        np.cumsum(counts_W) - counts_W, counts_W
    )


def _best_exchange(heavy_PM, light_PM, wanted_P, gap_P):
    """For P pairs of ranks whose loads differ by `gap_P`, the exchange of two users that moves nearest to `wanted_P` from the
    heavy to the light one: whether both are then below what the heavy one had, its column, the light rank's column.

    heavy_PM, light_PM: costs of up to M users of each rank; `_ABSENT` stands for none.
    """
    pairs, users = heavy_PM.shape
    row = np.arange(pairs)[:, None]
    by_cost = np.argsort(heavy_PM, axis=1, kind="stable")
    tried = by_cost[
        :, np.unique(np.linspace(0, users - 1, min(users, _TRIED)).astype(np.int64))
    ]
    given_PC = heavy_PM[row, tried]
    top = int(max(heavy_PM.max(), light_PM.max())) + 1
    light_PM = np.where(light_PM == _ABSENT, top, light_PM)
    light_order = np.argsort(light_PM, axis=1, kind="stable")
    sorted_PM = light_PM[row, light_order]
    # One search over all pairs: each pair's costs lie in a range of their own.
    keys = (sorted_PM + row * (top + 1)).reshape(-1)
    sought_PC = np.clip(given_PC - wanted_P[:, None], 0, top) + row * (top + 1)
    found_PC = (
        np.searchsorted(keys, sought_PC.reshape(-1)).reshape(sought_PC.shape)
        - row * users
    )
    best_off, best = np.full(pairs, _NEVER), np.zeros((2, pairs), np.int64)
    for column_PC in (np.maximum(found_PC - 1, 0), np.minimum(found_PC, users - 1)):
        taken_PC = sorted_PM[row, column_PC]
        moved_PC = given_PC - taken_PC
        possible_PC = (
            (taken_PC < top)
            & (given_PC != _ABSENT)
            & (moved_PC > 0)
            & (moved_PC < gap_P[:, None])
        )
        off_PC = np.where(possible_PC, np.abs(moved_PC - wanted_P[:, None]), _NEVER)
        choice = off_PC.argmin(1)
        columns = (
            tried[row[:, 0], choice],
            light_order[row[:, 0], column_PC[row[:, 0], choice]],
        )
        closer = off_PC[row[:, 0], choice] < best_off
        best = np.where(closer, columns, best)
        best_off = np.minimum(best_off, off_PC[row[:, 0], choice])
    return best_off < _NEVER, *best
