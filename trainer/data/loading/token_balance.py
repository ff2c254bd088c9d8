"""Load balancing: which rank takes which user of a batch, so that all have equally much to do.

A user starts on its home rank, whose shards hold it. Users are first moved until all ranks have
equally many. Then heavy and light ranks exchange users, one for one, until no rank has noticeably
more than the mean: all wait for the slowest rank. Every rank computes the same for the whole batch
from the users' lengths, so nothing is sent.

A rank exchanges with few others, always the same: each of them costs its loaders a shard to open
and a block to decode. With 2ᵏ ranks these are the k ranks whose numbers differ in one bit. The
batch is evened out bit after bit, the lowest first ("dimension exchange", Cybenko 1989). The first
three bits are the neighbours of a host of eight. A user is exchanged once, so a rank reads its own
shards and those of these k.

An example: six users on 2 ranks, whose tokens are

    user          0    1    2    3    4    5
    home rank     0    0    0    0    1    1
    tokens       40   10   30   20    5   15

    equal counts  0    0    0    1    1    1      80 and 40 tokens: rank 0 gives its last user
    equal tokens  0    1    1    1    0    0      60 and 60 tokens: users 1 and 2 for 4 and 5

Letters at the end of names: B users of the batch, W ranks, G sets of S ranks that exchange users,
P pairs of a heavy and a light rank, M users that a rank offers, C of these that are considered.
"""

import numpy as np

from trainer.data.loading.jagged import count_within_rows

_TOLERANCE = 0.0075  # how far above the mean of all a rank may stay
# Of the tolerance: how far above the mean of a set, of which several come in turn.
_OF_A_SET = 0.5
_ROUNDS = 32
# Users of a heavy rank that are considered in a round, from its longest to its shortest.
_TRIED = 32
_OFFERED = 24  # users of each rank that are enough to choose from
# More than these are sorted in vain, and lie in more blocks.
_MOST_OFFERED = 128
_ABSENT = -1
_NEVER = np.iinfo(np.int64).max


def count_view_tokens(lengths_BD: np.ndarray, max_length: int) -> np.ndarray:
    """Tokens that each user brings into a step, both views together: int64 (B,).

    This is one more than `syncrec.batch.build` makes of it: the newest interaction is no input.

    lengths_BD: interactions of the training part by domain, of any integer dtype. max_length:
    tokens of a sequence at most.

        lengths_BD  [[3, 0], [2, 9]], max_length 5
        cross-domain view    [3, 5]            min(3 + 0, 5), min(2 + 9, 5)
        single-domain view   [4, 3 + 5]        a domain that the user has: one more, for SOS
        tokens               [7, 13]
    """
    lengths_BD = lengths_BD.astype(np.int32)
    lengths_B = lengths_BD.sum(1)
    cross_B = np.minimum(lengths_B, max_length)
    single_BD = np.minimum(lengths_BD + 1, max_length)
    has_domain_BD = lengths_BD > 0
    single_B = (single_BD * has_domain_BD).sum(1)
    return cross_B + single_B


def equalize_counts(home_B: np.ndarray, world_size: int) -> np.ndarray:
    """The rank of each user, int64 (B,), so that ranks have equally many users.

    That is the home rank, but for the users of which it has too many; these come last in the
    batch. Ranks have B / world_size users, rounded up on those that own the most, else down.

        home_B     [0, 0, 0, 0, 1, 1]    2 ranks
        counts_W   [4, 2]
        room_W     [3, 3]
        rank_B     [0, 0, 0, 1, 1, 1]    rank 0 has no room for its fourth user
    """
    users = len(home_B)
    counts_W = np.bincount(home_B, minlength=world_size)
    room_W = np.full(world_size, users // world_size)
    by_count = np.argsort(-counts_W, kind="stable")
    room_W[by_count[: users % world_size]] += 1
    rank_B = home_B.astype(np.int64)
    if (counts_W > room_W).any():
        order, turn = _group_by_rank(home_B, counts_W)
        home_of_sorted = home_B[order]
        has_no_room = turn >= room_W[home_of_sorted]
        surplus = order[has_no_room]
        # Home after home: a rank is given to by few.
        missing_W = np.maximum(room_W - counts_W, 0)
        ranks = np.arange(world_size)
        rank_B[surplus] = np.repeat(ranks, missing_W)
    return rank_B


def balance_tokens(
    home_B: np.ndarray,
    cost_B: np.ndarray,
    world_size: int,
    turn_B: np.ndarray | None = None,
) -> np.ndarray:
    """The rank of each user, int64 (B,): equally many users and about equally many tokens a rank.

    No rank's sum of `cost_B` is noticeably above the mean. The result is the same on every machine.

    home_B: the rank to which each user's shard belongs. cost_B: what it brings, see
    `count_view_tokens`. turn_B: which of its home's streams it is of, 0 first. Users of few streams
    are exchanged, if they suffice, and between few ranks, see `pair_ranks`: the ranks then share
    few blocks.

        home_B     [0, 0, 0, 0, 1, 1]          2 ranks
        cost_B     [40, 10, 30, 20, 5, 15]
        rank_B     [0, 1, 1, 1, 0, 0]          60 tokens each
    """
    rank_B = equalize_counts(home_B, world_size)
    if world_size == 1 or len(home_B) <= world_size:
        return rank_B
    cost_B = cost_B.astype(np.int64)
    load_W = np.zeros(world_size, np.int64)
    np.add.at(load_W, rank_B, cost_B)
    mean = load_W.sum() / world_size
    limit = int(mean * (1 + _TOLERANCE))
    offers = _choose_offers(turn_B, len(home_B), world_size)
    for offer in offers:
        offered = _take_first_of_ranks(rank_B, offer, world_size)
        for member_GS in pair_ranks(world_size):
            if load_W.max() <= limit:
                return rank_B
            mean_G = load_W[member_GS].mean(1)
            limit_G = mean_G * (1 + _OF_A_SET * _TOLERANCE)
            limit_G = limit_G.astype(np.int64)
            is_at_home = rank_B[offered] == home_B[offered]
            at_home = offered[is_at_home]
            _exchange_users(rank_B, cost_B, load_W, member_GS, limit_G, at_home)
    # Where these sets do not suffice: a few users in a long batch, or a very long one.
    everyone_GS = np.arange(world_size)[None]
    limit_G = np.array([limit])
    for offered in offers:
        if load_W.max() > limit:
            _exchange_users(
                rank_B, cost_B, load_W, everyone_GS, limit_G, offered
            )
    return rank_B


def _choose_offers(
    turn_B: np.ndarray | None,
    users: int,
    world_size: int,
) -> list[np.ndarray]:
    """Which users may be exchanged: those of few streams, if that is not all, then everyone.

    turn_B: as in `balance_tokens`. Where one stream of each rank is enough:

        turn_B     [0, 0, 1, 1, 0, 2]
        returns    [0, 1, 4], [0, 1, 2, 3, 4, 5]
    """
    everyone = np.arange(users)
    if turn_B is None:
        return [everyone]
    last_turn = int(turn_B.max())
    streams_of_rank = 1 + last_turn
    wanted_users = _OFFERED * world_size
    enough_streams = -(-wanted_users * streams_of_rank // users)
    of_few_streams = np.flatnonzero(turn_B < enough_streams)
    if len(of_few_streams) == users:
        return [everyone]
    return [of_few_streams, everyone]


def pair_ranks(world_size: int) -> list[np.ndarray]:
    """Which ranks exchange users, stage after stage: int64 (G, S), G sets of S ranks each.

    Every rank is in one set of a stage. S is a prime factor of the number of ranks, the smallest
    first. The numbers of a set's ranks differ in one digit: the first stages are of neighbours.

        6 ranks:  [[0, 1], [2, 3], [4, 5]]   then   [[0, 2, 4], [1, 3, 5]]
    """
    stages = []
    stride = 1
    factor = 2
    while stride < world_size:
        if world_size // stride % factor:
            factor += 1
            continue
        ranks = np.arange(world_size)
        by_digits = ranks.reshape(-1, factor, stride)
        sets = np.moveaxis(by_digits, 1, 2)
        stages.append(sets.reshape(-1, factor))
        stride *= factor
    return stages


def _exchange_users(
    rank_B: np.ndarray,
    cost_B: np.ndarray,
    load_W: np.ndarray,
    member_GS: np.ndarray,
    limit_G: np.ndarray,
    offered: np.ndarray,
) -> None:
    """Exchanges offered users within each set until no load of a set is above the set's limit.

    In each round the heaviest rank of a set and its lightest one exchange the two users that bring
    their loads nearest to the mean, and so do the next ones. Where no exchange helps, the heavy
    rank meets another light one in the next round. Changes `rank_B` and `load_W`.

        rank_B      [0, 0, 0, 1, 1, 1]         2 ranks, all users are offered
        cost_B      [40, 10, 30, 20, 5, 15]
        load_W      [80, 40]
        rank_B      [1, 0, 0, 0, 1, 1]         afterwards
        load_W      [60, 60]
    """
    sets, size = member_GS.shape
    user_WM = _list_users_of_ranks(rank_B, offered, len(load_W))
    cost_WM = np.where(user_WM == _ABSENT, _ABSENT, cost_B[user_WM])
    load_GS = load_W[member_GS]
    mean_G = load_GS.sum(1) // size
    shift_G = np.zeros(sets, np.int64)
    for _ in range(_ROUNDS):
        set_P, heavy, light = _pair_heavy_and_light(
            load_W, member_GS, limit_G, shift_G
        )
        if len(set_P) == 0:
            break
        mean_P = mean_G[set_P]
        surplus_P = load_W[heavy] - mean_P
        lack_P = mean_P - load_W[light]
        gap_P = surplus_P + lack_P
        # The heavy rank's surplus goes over whole where the light rank has room for it: one
        # exchange is then enough.
        room_P = lack_P + limit_G[set_P] - mean_P
        wanted_P = np.where(surplus_P <= room_P, surplus_P, gap_P // 2)
        better, give, take = _find_best_exchange(
            cost_WM[heavy], cost_WM[light], wanted_P, gap_P
        )
        shift_G[set_P] += 1  # other partners, once whatever the pairs of a set,
        better_set = set_P[better]
        shift_G[better_set] = 0  # unless these will do
        heavy = heavy[better]
        light = light[better]
        give = give[better]
        take = take[better]
        given = cost_WM[heavy, give]
        taken = cost_WM[light, take]
        moved = given - taken
        load_W[heavy] -= moved
        load_W[light] += moved
        _swap(user_WM, heavy, give, light, take)
        _swap(cost_WM, heavy, give, light, take)
    present_WM = user_WM != _ABSENT
    rank_of_present, _ = np.nonzero(present_WM)
    rank_B[user_WM[present_WM]] = rank_of_present


def _list_users_of_ranks(
    rank_B: np.ndarray,
    offered: np.ndarray,
    world_size: int,
) -> np.ndarray:
    """The offered users of each rank, in the batch's order: (W, M); `_ABSENT` past the end.

    rank_B     [0, 1, 0]
    user_WM    [[0, 2], [1, -1]]    where all three are offered
    """
    rank_of_offered = rank_B[offered]
    counts_W = np.bincount(rank_of_offered, minlength=world_size)
    order, turn = _group_by_rank(rank_of_offered, counts_W)
    most_users = counts_W.max()
    user_WM = np.full((world_size, most_users), _ABSENT)
    rank_of_sorted = rank_of_offered[order]
    user_WM[rank_of_sorted, turn] = offered[order]
    return user_WM


def _pair_heavy_and_light(
    load_W: np.ndarray,
    member_GS: np.ndarray,
    limit_G: np.ndarray,
    shift_G: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs the heaviest rank of each set with the lightest one, the next with the next.

    Each int64 (P,): the pair's set, its heavy rank, its light rank. shift_G: how many of the
    lightest ranks are passed over; a set that has no others left has no pairs.

        member_GS    [[0, 1], [2, 3]]
        load_W       [9, 5, 6, 6]
        limit_G      [7, 7]
        shift_G      [0, 0]
        returns      [0], [0], [1]       only rank 0 is too heavy, and pairs with rank 1
    """
    _, size = member_GS.shape
    load_GS = load_W[member_GS]
    order_GS = np.argsort(load_GS, axis=1, kind="stable")
    by_load_GS = np.take_along_axis(member_GS, order_GS, 1)
    too_heavy_GS = load_GS > limit_G[:, None]
    too_heavy_G = too_heavy_GS.sum(1)
    pairs_G = np.minimum(too_heavy_G, size // 2)
    has_others_G = shift_G + 2 * pairs_G <= size
    tries_G = (pairs_G > 0) & has_others_G
    pair = np.arange(size // 2)[None]
    is_pair = tries_G[:, None] & (pair < pairs_G[:, None])
    set_P, pair_P = np.nonzero(is_pair)
    from_heaviest_P = size - 1 - pair_P
    from_lightest_P = shift_G[set_P] + pair_P
    heavy = by_load_GS[set_P, from_heaviest_P]
    light = by_load_GS[set_P, from_lightest_P]
    return set_P, heavy, light


def _swap(
    array_WM: np.ndarray,
    heavy: np.ndarray,
    give: np.ndarray,
    light: np.ndarray,
    take: np.ndarray,
) -> None:
    """Exchanges entries of heavy ranks with entries of light ones.

    heavy, light: a rank each of every pair. give, take: their columns.

        array_WM    [[40, 10, 30], [20, 5, 15]]    before
        array_WM    [[40, 10, 15], [20, 5, 30]]    heavy [0] give [2], light [1] take [2]
    """
    from_heavy = array_WM[heavy, give]
    from_light = array_WM[light, take]
    array_WM[heavy, give] = from_light
    array_WM[light, take] = from_heavy


def _take_first_of_ranks(
    rank_B: np.ndarray,
    offered: np.ndarray,
    world_size: int,
) -> np.ndarray:
    """Of the offered users, the first `_MOST_OFFERED` of each rank in the batch's order.

    If it were one of each rank:

        rank_B     [1, 0, 1, 0]
        offered    [0, 1, 2, 3]
        returns    [1, 0]
    """
    rank_of_offered = rank_B[offered]
    counts_W = np.bincount(rank_of_offered, minlength=world_size)
    order, turn = _group_by_rank(rank_of_offered, counts_W)
    is_first = turn < _MOST_OFFERED
    first = order[is_first]
    return offered[first]


def _group_by_rank(
    rank_B: np.ndarray, counts_W: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Users sorted by rank, in the batch's order within it; each one's number among its rank's.

    rank_B     [1, 0, 1, 0]
    returns    [1, 3, 0, 2], [0, 1, 0, 1]
    """
    if len(counts_W) <= 2**16:
        rank_B = rank_B.astype(np.uint16)  # which NumPy sorts by counting
    order = np.argsort(rank_B, kind="stable")
    return order, count_within_rows(counts_W)


def _find_best_exchange(
    heavy_PM: np.ndarray,
    light_PM: np.ndarray,
    wanted_P: np.ndarray,
    gap_P: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For P pairs of ranks, the exchange of two users that moves nearest to `wanted_P` tokens.

    They move from the heavy rank to the light one. Returns whether both are then below what the
    heavy one had, the heavy rank's column, and the light rank's column.

    heavy_PM, light_PM: costs of up to M users of each rank; `_ABSENT` stands for none. gap_P: by
    how much the loads of a pair differ.

        heavy_PM    [[40, 10, 30]]
        light_PM    [[20, 5, 15]]
        wanted_P    [20]
        gap_P       [40]
        returns     [True], [0], [0]     40 against 20 moves 20 tokens
    """
    pairs, users = heavy_PM.shape
    pair = np.arange(pairs)
    row = pair[:, None]
    wanted_P1 = wanted_P[:, None]
    gap_P1 = gap_P[:, None]
    tried_PC = _choose_tried(heavy_PM)
    give_PC = heavy_PM[row, tried_PC]
    top = max(heavy_PM.max(), light_PM.max())
    top = int(top) + 1  # stands for none of the light rank
    light_PM = np.where(light_PM == _ABSENT, top, light_PM)
    light_order = np.argsort(light_PM, axis=1, kind="stable")
    sorted_PM = light_PM[row, light_order]
    sought_PC = give_PC - wanted_P1
    above_PC = _search_rows(sorted_PM, sought_PC, top)
    best_error = np.full(pairs, _NEVER)
    best_give = np.zeros(pairs, np.int64)
    best_take = np.zeros(pairs, np.int64)
    below_PC = np.maximum(above_PC - 1, 0)
    above_PC = np.minimum(above_PC, users - 1)
    for column_PC in (below_PC, above_PC):
        take_PC = sorted_PM[row, column_PC]
        moved_PC = give_PC - take_PC
        possible_PC = (
            (take_PC < top)
            & (give_PC != _ABSENT)
            & (moved_PC > 0)
            & (moved_PC < gap_P1)
        )
        error_PC = np.abs(moved_PC - wanted_P1)
        error_PC = np.where(possible_PC, error_PC, _NEVER)
        choice = error_PC.argmin(1)
        error = error_PC[pair, choice]
        closer = error < best_error
        give = tried_PC[pair, choice]
        column = column_PC[pair, choice]
        take = light_order[pair, column]
        best_give = np.where(closer, give, best_give)
        best_take = np.where(closer, take, best_take)
        best_error = np.minimum(best_error, error)
    return best_error < _NEVER, best_give, best_take


def _search_rows(
    sorted_PM: np.ndarray,
    sought_PC: np.ndarray,
    top: int,
) -> np.ndarray:
    """`np.searchsorted` of each row of `sought_PC` in that of `sorted_PM`: int64 (P, C).

    It is one search over all rows: each row's numbers lie in a range of their own. top: the
    largest number of `sorted_PM`, which has none below 0.

        sorted_PM    [[5, 15, 20], [1, 2, 3]]
        sought_PC    [[20, -10], [2, 9]]
        returns      [[2, 0], [1, 3]]
    """
    pairs, users = sorted_PM.shape
    row = np.arange(pairs)[:, None]
    range_begin = row * (top + 1)
    keys = sorted_PM + range_begin
    sought_PC = np.clip(sought_PC, 0, top)
    sought_PC = sought_PC + range_begin
    sought = sought_PC.reshape(-1)
    index = np.searchsorted(keys.reshape(-1), sought)
    index_PC = index.reshape(sought_PC.shape)
    return index_PC - row * users


def _choose_tried(heavy_PM: np.ndarray) -> np.ndarray:
    """The columns of up to `_TRIED` users of each heavy rank, evenly by cost: (P, C).

    If it were two of them:

        heavy_PM    [[40, 10, 30]]
        returns     [[1, 0]]
    """
    _, users = heavy_PM.shape
    by_cost_PM = np.argsort(heavy_PM, axis=1, kind="stable")
    tried = min(users, _TRIED)
    places = np.linspace(0, users - 1, tried)
    places = np.unique(places.astype(np.int64))
    return by_cost_PM[:, places]
