import itertools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncrec.batch.build import build_batch, trim
from tests.helpers.made import draw_histories, write_dataset
from trainer.data.counter_rng import RandomStream, permutation
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import read_users
from trainer.data.loading.token_balance import (
    balance_tokens,
    count_view_tokens,
    equalize_counts,
    pair_ranks,
)
from trainer.errors import InputError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """57 users in 6 uneven shards, 3 streams: with batches of 8 users, seven or eight steps an epoch."""
    histories = draw_histories(57)
    return write_dataset(
        tmp_path_factory.mktemp("plan") / "data",
        histories,
        cuts=(9, 20, 21, 33, 47),
        streams=3,
    )


@st.composite
def layouts(draw):
    """How many users lie in each shard, how many streams, and the users of a block."""
    streams = draw(st.integers(1, 5))
    shards = streams * draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(1, 5), min_size=shards, max_size=shards))
    return sizes, streams, draw(st.integers(1, 4))


def made(folder, layout, longest=4):
    sizes, streams, block_users = layout
    histories = draw_histories(sum(sizes), longest=longest)
    cuts = np.cumsum(sizes)[:-1].tolist()
    return histories, write_dataset(
        Path(folder) / "data",
        histories,
        cuts=cuts,
        streams=streams,
        block_users=block_users,
    )


def slots_by_hand(layout, seed, epoch, shuffle):
    """The users of an epoch slot by slot, None where a slot is empty: read off what the module promises, one at a time."""
    sizes, streams, block_users = layout
    firsts = np.cumsum([0, *sizes])
    dealt = (
        permutation(len(sizes), seed, RandomStream.SHARD_ORDER, epoch).tolist()
        if shuffle
        else list(range(len(sizes)))
    )
    own = []
    for stream in range(streams):
        own.append([])
        for shard in dealt[stream::streams]:
            for place in range(-(-sizes[shard] // block_users)):
                count = min(block_users, sizes[shard] - place * block_users)
                order = (
                    permutation(
                        count,
                        seed,
                        RandomStream.USER_ORDER,
                        epoch,
                        shard,
                        place,
                    ).tolist()
                    if shuffle
                    else range(count)
                )
                own[-1] += [
                    int(firsts[shard]) + place * block_users + user
                    for user in order
                ]
    return list(itertools.chain(*itertools.zip_longest(*own)))


@settings(max_examples=40)
@given(layouts(), st.integers(5, 12), st.integers(0, 3), st.booleans())
def test_a_batch_is_a_range_of_the_slots_that_streams_fill_in_turn(
    layout, batch_size, epoch, shuffle
):
    slots = slots_by_hand(layout, 1, epoch, shuffle)
    batches = [
        slots[begin : begin + batch_size]
        for begin in range(0, len(slots), batch_size)
    ]
    batches = [
        [user for user in batch if user is not None] for batch in batches
    ]
    while not batches[-1]:
        batches.pop()
    with tempfile.TemporaryDirectory() as folder:
        _, dataset = made(folder, layout)
        plan = BatchSchedule(dataset, batch_size, 1, seed=1, shuffle=shuffle)
        assert [
            plan.users(epoch, step, 0).tolist()
            for step in range(plan.steps(epoch))
        ] == batches


@settings(max_examples=25)
@given(
    layouts(),
    st.integers(5, 12),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 15, 40]),
)
def test_every_world_size_sees_the_same_batches_and_every_user_once(
    layout, batch_size, epoch, shuffle, balance, tokens
):
    with tempfile.TemporaryDirectory() as folder:
        histories, dataset = made(folder, layout)
        seen = {}
        for world_size in range(1, dataset.streams + 1):
            limits = {
                "max_length": 3,
                "tokens_per_batch": tokens,
                "balance": balance,
            }
            plan = BatchSchedule(
                dataset, batch_size, world_size, 1, shuffle, **limits
            )
            steps = range(plan.steps(epoch))
            by_rank = [
                list(read_users(plan, epoch, steps, rank))
                for rank in range(world_size)
            ]
            assert all(
                [step for step, _ in batches] == list(steps)
                for batches in by_rank
            )
            batches = []
            for step in steps:
                parts = [batches[step][1] for batches in by_rank]
                counts = [len(part.number_B) for part in parts]
                assert max(1, *counts) == plan.users_per_rank(epoch, step)
                assert not balance or max(counts) - min(counts) <= 1
                for rank, part in enumerate(parts):
                    assert (
                        part.number_B.tolist()
                        == plan.users(epoch, step, rank).tolist()
                    )
                    ends = np.cumsum(part.lengths_B)
                    for number, begin, end in zip(
                        part.number_B, ends - part.lengths_B, ends, strict=True
                    ):
                        assert (
                            part.items_N[begin:end].tolist()
                            == histories[number].tolist()
                        )
                batches.append(
                    sorted(
                        np.concatenate(
                            [part.number_B for part in parts]
                        ).tolist()
                    )
                )
            assert sorted(itertools.chain(*batches)) == list(
                range(len(histories))
            )
            assert (
                max(len(batch) for batch in batches) <= batch_size
                and batches[-1]
            )
            seen[world_size] = batches
        assert all(batches == seen[1] for batches in seen.values())


@settings(max_examples=40)
@given(
    layouts(),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 2),
)
def test_a_batch_takes_users_until_the_next_would_be_too_many_tokens(
    layout, batch_size, max_length, more, epoch
):
    limit = max_length + more
    with tempfile.TemporaryDirectory() as folder:
        histories, dataset = made(folder, layout, longest=7)
        plan = BatchSchedule(
            dataset,
            batch_size,
            1,
            seed=1,
            max_length=max_length,
            tokens_per_batch=limit,
        )
        batches, tokens = [[]], 0
        for user in slots_by_hand(layout, 1, epoch, True):
            if user is None:
                continue
            length = len(histories[user]) - 2 * (len(histories[user]) > 2)
            tokens += min(length, max_length)
            if batches[-1] and (
                tokens > limit or len(batches[-1]) == batch_size
            ):
                batches.append([])
                tokens = min(length, max_length)
            batches[-1].append(user)
        assert [
            plan.users(epoch, step, 0).tolist()
            for step in range(plan.steps(epoch))
        ] == batches


def test_long_epochs_are_walked_through_in_pieces(tmp_path, monkeypatch):
    """Any size of the pieces gives the same batches."""
    _, dataset = made(tmp_path, ([7, 2, 5, 9, 1, 4], 3, 3))
    found = []
    for size in (1, 4, 7, 1 << 15):
        monkeypatch.setattr(
            "trainer.data.loading.batch_schedule._CHUNK_SLOTS", size
        )
        for tokens in (0, 9):
            plan = BatchSchedule(
                dataset, 6, 1, seed=1, max_length=3, tokens_per_batch=tokens
            )
            found.append(
                [
                    plan.users(epoch, step, 0).tolist()
                    for epoch in range(3)
                    for step in range(plan.steps(epoch))
                ]
            )
    assert found[0] != found[1] and all(
        one == found[place % 2] for place, one in enumerate(found)
    )


class Sum:
    """`sum_of_ranks` of ranks that are threads."""

    def __init__(self, ranks):
        self.given, self.barrier = (
            [None] * ranks,
            threading.Barrier(ranks, timeout=30),
        )

    def of(self, rank):
        def sum_of_ranks(values_N):
            self.given[rank] = values_N
            self.barrier.wait()
            total_N = np.sum(self.given, axis=0)
            self.barrier.wait()
            return total_N

        return sum_of_ranks


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [0, 30])
def test_ranks_walk_through_an_epoch_each_and_tell_the_others(
    dataset, monkeypatch, epochs, tokens
):
    walked = []
    walk = BatchSchedule._cut_by_tokens
    monkeypatch.setattr(
        BatchSchedule,
        "_cut_by_tokens",
        lambda plan, epoch: walked.append(epoch) or walk(plan, epoch),
    )
    limits = {"max_length": 5, "tokens_per_batch": tokens}
    alone = BatchSchedule(dataset, 8, 3, seed=1, **limits)
    steps = [alone.steps(epoch) for epoch in range(epochs)]
    walked.clear()
    plans = [BatchSchedule(dataset, 8, 3, seed=1, **limits) for _ in range(3)]
    told = Sum(3)
    with ThreadPoolExecutor(3) as pool:
        totals = list(
            pool.map(
                lambda rank: plans[rank].count_steps(
                    epochs, rank, told.of(rank)
                ),
                range(3),
            )
        )
    assert totals == [sum(steps)] * 3
    asked = [
        (epoch, step) for epoch in range(epochs) for step in range(steps[epoch])
    ]
    for plan in plans:
        for epoch, step in asked:
            assert (
                plan.users(epoch, step, 2).tolist()
                == alone.users(epoch, step, 2).tolist()
            )
    assert sorted(walked) == (list(range(epochs)) if tokens else [])


def test_epochs_beyond_the_last_step_are_not_walked_through(
    dataset, monkeypatch
):
    walked = []
    walk = BatchSchedule._cut_by_tokens
    monkeypatch.setattr(
        BatchSchedule,
        "_cut_by_tokens",
        lambda plan, epoch: walked.append(epoch) or walk(plan, epoch),
    )
    plan = BatchSchedule(
        dataset, 8, 1, seed=1, max_length=5, tokens_per_batch=30
    )
    assert plan.count_steps(10**9, most=plan.steps(0) + 1) == plan.steps(0) + 1
    assert walked == [0, 1]
    assert (
        plan.count_steps(2)
        == plan.count_steps(2, most=10**6)
        == plan.steps(0) + plan.steps(1)
    )


def test_epochs_and_steps_may_be_asked_for_in_any_order(dataset):
    """What is kept from one call to the next changes nothing."""
    for tokens in (0, 30):
        limits = {"max_length": 5, "tokens_per_batch": tokens}
        plan = BatchSchedule(dataset, 8, 2, seed=1, **limits)
        asked = [
            (epoch, step)
            for epoch in range(4)
            for step in range(plan.steps(epoch))
        ]
        for epoch, step in np.random.default_rng(0).permutation(asked).tolist():
            fresh = BatchSchedule(dataset, 8, 2, seed=1, **limits)
            assert (
                plan.users(epoch, step, 1).tolist()
                == fresh.users(epoch, step, 1).tolist()
            )


def orders(dataset, seed, shuffle=True):
    """The users of each of three epochs in their order."""
    plan = BatchSchedule(dataset, 8, 1, seed, shuffle)
    batches = [
        [plan.users(epoch, step, 0) for step in range(plan.steps(epoch))]
        for epoch in range(3)
    ]
    return [tuple(np.concatenate(epoch).tolist()) for epoch in batches]


def test_each_epoch_and_seed_has_its_own_order(dataset):
    found = orders(dataset, 1) + orders(dataset, 2)
    assert len(set(found)) == 6
    assert all(sorted(order) == list(range(57)) for order in found)
    # Shards move, and users within their block: of three users, one order in six is the same again.
    shards = [(0, 9), (9, 20), (21, 33), (33, 47)]
    blocks = [
        range(begin, min(begin + 3, last))
        for first, last in shards
        for begin in range(first, last, 3)
    ]
    within = [
        [sorted(block, key=order.index) for block in blocks] for order in found
    ]
    for one, other in itertools.combinations(within, 2):
        assert (
            sum(a == b for a, b in zip(one, other, strict=True))
            < len(blocks) / 2
        )
    places = [
        [min(order.index(user) for user in range(*shard)) for shard in shards]
        for order in found
    ]
    assert len({tuple(np.argsort(place)) for place in places}) > 2


def test_without_shuffle_every_epoch_is_the_datasets_own_order(dataset):
    assert (
        len(
            set(
                orders(dataset, 1, shuffle=False)
                + orders(dataset, 2, shuffle=False)
            )
        )
        == 1
    )


@pytest.mark.parametrize("tokens", [0, 18])
def test_locate_counts_steps_over_epochs(dataset, tokens):
    plan = BatchSchedule(
        dataset, 8, 1, seed=4, max_length=6, tokens_per_batch=tokens
    )
    steps = [plan.steps(epoch) for epoch in range(4)]
    assert (
        len(set(steps)) > 1
    )  # uneven streams, users of different lengths: the number of steps depends on the epoch
    expected = [
        (epoch, step) for epoch in range(4) for step in range(steps[epoch])
    ]
    assert [plan.locate(position) for position in range(sum(steps))] == expected


def test_lengths_are_looked_at_only_where_they_matter(dataset):
    """A benchmark's dataset has none, and one rank needs none."""
    (dataset.folder / "lengths.npy").rename(dataset.folder / "away")
    try:
        for world_size, balance in ((1, True), (3, False)):
            plan = BatchSchedule(
                dataset, 8, world_size, seed=4, balance=balance
            )
            assert len(plan.users(0, plan.steps(0) - 1, 0))
    finally:
        (dataset.folder / "away").rename(dataset.folder / "lengths.npy")


def test_what_cannot_be_is_refused(dataset):
    with pytest.raises(
        InputError, match=r"4 ranks, but .*data has 3 streams.*--streams 4"
    ):
        BatchSchedule(dataset, 8, 4, 0)
    with pytest.raises(
        InputError, match=r"global_batch_size=2 is below the number of ranks, 3"
    ):
        BatchSchedule(dataset, 2, 3, 0)
    with pytest.raises(
        InputError,
        match=r"tokens_per_batch=11 is below .* 3 x model\.max_length=4: raise it to 12 or more",
    ):
        BatchSchedule(dataset, 8, 3, 0, max_length=4, tokens_per_batch=11)
    assert BatchSchedule(
        dataset, 8, 3, 0, max_length=4, tokens_per_batch=12
    ).steps(0)


# Balance.


@pytest.mark.parametrize("max_length", [1, 3, 100])
def test_the_cost_of_a_user_is_its_tokens_in_both_views_and_one(max_length):
    domain_items = (5, 4, 3)
    random = np.random.default_rng(0)
    lengths_B = random.integers(1, 12, 40)
    domain_N = random.integers(0, 3, lengths_B.sum())
    user_N = np.repeat(np.arange(40), lengths_B)
    lengths_BD = np.zeros((40, 3), np.uint16)
    np.add.at(lengths_BD, (user_N, domain_N), 1)
    found = count_view_tokens(lengths_BD, max_length)
    kept_N, lengths_B, domain_N = trim(
        np.arange(len(domain_N)), lengths_B, domain_N, max_length
    )
    negatives = np.zeros((len(kept_N), 1), np.int64)
    batch = build_batch(
        kept_N,
        lengths_B,
        domain_N,
        np.ones(40),
        negatives,
        domain_items,
        max_length,
    )
    cross = np.bincount(batch.cross.sequence_M, minlength=40)
    user_S = np.array(
        [
            user_N[kept_N[interaction]]
            for interaction in _interactions(batch.single)
        ]
    )
    exact = cross + np.bincount(user_S, minlength=40)
    assert (
        found.tolist()
        == count_view_tokens(lengths_BD.astype(np.int64), max_length).tolist()
    )
    assert ((found == exact) | (found == exact + 1)).all() and (
        max_length < 100 or (found > exact).all()
    )


def _interactions(view):
    """For each token of a view an interaction of the same sequence."""
    some = {}
    for sequence, place in zip(
        view.sequence_M.tolist(), view.input_M.tolist(), strict=True
    ):
        if place:
            some[sequence] = place - 1
    for token, target in zip(
        view.target_token_L.tolist(),
        view.target_interaction_L.tolist(),
        strict=True,
    ):
        some[int(view.sequence_M[token])] = target
    return [some[sequence] for sequence in view.sequence_M.tolist()]


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(7, 9))
def test_counts_are_made_equal_with_as_few_moves_as_possible(home, world_size):
    home_B = np.array(home, np.int64)
    rank_B = equalize_counts(home_B, world_size)
    counts_W = np.bincount(rank_B, minlength=world_size)
    assert counts_W.max() - counts_W.min() <= 1
    room_W = sorted(counts_W.tolist())
    least = sum(
        max(0, own - room)
        for own, room in zip(
            sorted(np.bincount(home_B, minlength=world_size)),
            room_W,
            strict=True,
        )
    )
    assert (rank_B != home_B).sum() == least


@st.composite
def realistic(draw):
    """(home, cost, world size, turn) of a batch: lengths as they are met, streams in turn, part of a row of them last."""
    world_size, per_rank = draw(
        st.sampled_from(
            [(2, 64), (3, 30), (8, 16), (8, 50), (16, 24), (64, 16)]
        )
    )
    streams = world_size * draw(st.integers(1, 4)) + draw(st.integers(0, 2))
    users = world_size * per_rank - draw(st.integers(0, world_size - 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths_B = random.geometric(
        1 / draw(st.sampled_from([10, 60, 300])), users
    )
    lengths_BD = np.stack(
        [random.binomial(lengths_B, share) for share in (0.5, 0.3, 0.2)], 1
    )
    lengths_BD[:, 0] += lengths_BD.sum(1) == 0
    stream_B = np.arange(users) % streams
    return (
        stream_B % world_size,
        count_view_tokens(lengths_BD, 128),
        world_size,
        stream_B // world_size,
    )


@settings(max_examples=150)
@given(realistic(), st.booleans())
def test_ranks_have_equally_many_users_and_tokens(batch, with_turns):
    home_B, cost_B, world_size, turn_B = batch
    rank_B = balance_tokens(
        home_B, cost_B, world_size, turn_B if with_turns else None
    )
    counts_W = np.bincount(rank_B, minlength=world_size)
    assert counts_W.max() - counts_W.min() <= 1
    load_W = np.bincount(rank_B, weights=cost_B, minlength=world_size)
    # Ranks of one user less than others have less to do in any case.
    assert load_W.max() <= 1.01 * load_W.mean() or (
        load_W.max() <= 1.03 * load_W.mean() and len(home_B) % world_size
    )


def test_few_users_leave_their_home():
    random = np.random.default_rng(1)
    stream_B = np.arange(8 * 512) % 64
    cost_B = 20 + np.minimum(random.geometric(1 / 60, len(stream_B)), 128)
    rank_B = balance_tokens(stream_B % 8, cost_B, 8, stream_B // 8)
    away = rank_B != stream_B % 8
    load_W = np.bincount(stream_B % 8, weights=cost_B)
    assert load_W.max() > 1.02 * load_W.mean()  # there was something to do
    assert away.mean() < 0.03
    assert (
        stream_B[away].max() < 8
    )  # of one stream a rank: there are few blocks to share


@given(st.integers(1, 600))
def test_partners_are_few_neighbours_first_and_lead_from_any_rank_to_any_other(
    world_size,
):
    reached = np.arange(world_size)[
        :, None
    ]  # the ranks that what a rank had may be on, after the stages so far
    for member_GS in pair_ranks(world_size):
        assert sorted(member_GS.reshape(-1).tolist()) == list(range(world_size))
        mates_WS = np.empty((world_size, member_GS.shape[1]), np.int64)
        mates_WS[member_GS] = member_GS[:, None]
        reached = mates_WS[reached].reshape(world_size, -1)
        lowest = reached.min(1)
        assert (
            reached.max(1) - lowest + 1 == reached.shape[1]
        ).all()  # consecutive ranks: a host's before others'
    assert reached.shape[1] == world_size
    if world_size & (world_size - 1) == 0:
        assert len(pair_ranks(world_size)) == world_size.bit_length() - 1


@pytest.mark.parametrize(
    ("world_size", "others"), [(8, 3), (16, 4), (24, 5), (64, 6)]
)
def test_a_rank_takes_users_of_few_others(world_size, others):
    """Batch after batch of the same ones: their shards are what its loaders open beside its own."""
    random = np.random.default_rng(2)
    met = [set() for _ in range(world_size)]
    beyond = 0
    for _ in range(15):
        home_B = np.arange(world_size * 96) % world_size
        lengths_B = np.minimum(
            random.lognormal(3.4, 1.2, len(home_B)).astype(np.int64) + 1, 128
        )
        rank_B = balance_tokens(home_B, 2 * lengths_B, world_size, home_B * 0)
        load_W = np.bincount(rank_B, weights=lengths_B, minlength=world_size)
        beyond = max(beyond, load_W.max() / load_W.mean())
        for rank, home in zip(rank_B.tolist(), home_B.tolist(), strict=True):
            met[rank].add(home)
    assert beyond < 1.01
    assert (
        np.mean([len(homes - {rank}) for rank, homes in enumerate(met)])
        <= others + 0.5
    )


def test_those_that_a_rank_has_too_many_of_go_to_few_others():
    """48 ranks of 64 streams: 16 of them own two."""
    stream_B = np.arange(48 * 64) % 64
    home_B = stream_B % 48
    rank_B = equalize_counts(home_B, 48)
    homes = [set(home_B[rank_B == rank].tolist()) for rank in range(48)]
    assert max(map(len, homes)) <= 3


@settings(max_examples=25)
@given(layouts(), st.integers(5, 12), st.integers(1, 3), st.integers(0, 3))
def test_every_shard_is_at_home_on_one_rank(
    layout, batch_size, world_size, epoch
):
    world_size = min(world_size, layout[1])
    with tempfile.TemporaryDirectory() as folder:
        _, dataset = made(folder, layout)
        plan = BatchSchedule(dataset, batch_size, world_size, 1)
        homes = [plan.home_shards(epoch, rank) for rank in range(world_size)]
        assert sorted(itertools.chain(*homes)) == list(
            range(len(dataset.shards))
        )
        firsts = [shard.first_user for shard in dataset.shards]
        for step in range(plan.steps(epoch)):
            users_B, home_B, _ = plan.ranks(epoch, step)
            shard_B = np.searchsorted(firsts, users_B, side="right") - 1
            assert all(
                shard in homes[home]
                for shard, home in zip(
                    shard_B.tolist(), home_B.tolist(), strict=True
                )
            )


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 3))
def test_any_batch_can_be_balanced(world_size, users, seed):
    """Whatever its costs are, also where nothing can be gained."""
    random = np.random.default_rng(seed)
    cost_B = random.choice([0, 1, 1000], users)
    home_B = random.integers(0, world_size, users)
    rank_B = balance_tokens(home_B, cost_B, world_size)
    assert rank_B.dtype == np.int64 and len(rank_B) == users
    counts_W = np.bincount(rank_B, minlength=world_size)
    assert len(counts_W) == world_size and counts_W.max() - counts_W.min() <= 1
    before = np.bincount(
        equalize_counts(home_B, world_size),
        weights=cost_B,
        minlength=world_size,
    )
    assert (
        np.bincount(rank_B, weights=cost_B, minlength=world_size).max()
        <= before.max()
    )


@settings(max_examples=25)
@given(
    layouts(), st.integers(5, 12), st.integers(1, 3), st.sampled_from([0, 20])
)
def test_next_shards_are_those_that_the_ranks_streams_begin_later(
    layout, batch_size, world_size, tokens
):
    world_size = min(world_size, layout[1])
    with tempfile.TemporaryDirectory() as folder:
        _, dataset = made(folder, layout)
        plan = BatchSchedule(
            dataset,
            batch_size,
            world_size,
            1,
            max_length=3,
            tokens_per_batch=tokens,
            balance=False,
        )
        firsts = [shard.first_user for shard in dataset.shards]
        names = [shard.name for shard in dataset.shards]
        for rank in range(world_size):
            begun = []  # in the order in which the rank meets them, over two epochs
            for epoch in range(2):
                for step in range(plan.steps(epoch)):
                    found = plan.users(epoch, step, rank)
                    begun.append(
                        {
                            (epoch, int(shard))
                            for shard in np.searchsorted(
                                firsts, found, side="right"
                            )
                            - 1
                        }
                    )
            for step in range(plan.steps(0)):
                seen = set().union(*begun[: step + 1])
                expected = []
                for later in begun[step + 1 :]:
                    expected.append({names[shard] for _, shard in later - seen})
                    seen |= later
                told = plan.next_shards(0, step, rank)
                assert len(told) == sum(map(len, expected))
                for group in expected:
                    assert set(told[: len(group)]) == group
                    told = told[len(group) :]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_larger_than_the_dataset_is_everyone(dataset, shuffle):
    """And takes no more memory than that: a slot is not made for each of its users."""
    plan = BatchSchedule(dataset, 2**31 - 1, 1, seed=1, shuffle=shuffle)
    assert plan.count_steps(epochs=3) == 3
    users, _ = plan.batch(1, 0)
    assert sorted(users.tolist()) == list(range(57))
    assert plan.users_per_rank(1, 0) == 57
    assert plan.next_shards(1, 0, 0)
