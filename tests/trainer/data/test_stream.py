import dataclasses
import gc
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.made import draw_histories, write_dataset
from trainer.data.negatives import NegativesConfig
from trainer.data.stream import Plan, StreamConfig, TrainBatches, Users, read_users, ready, training_part
from trainer.errors import InputError

LONG = 100  # tokens: more than any history here
HERE = StreamConfig(workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """57 users in 6 uneven shards, 3 streams: with batches of 8 users, seven or eight steps an epoch."""
    histories = draw_histories(57)
    return write_dataset(tmp_path_factory.mktemp("stream") / "data", histories, cuts=(9, 20, 21, 33, 47), streams=3)


@st.composite
def layouts(draw):
    """How many users lie in each shard, how many streams, and the users of a block."""
    streams = draw(st.integers(1, 5))
    shards = streams * draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(1, 5), min_size=shards, max_size=shards))
    return sizes, streams, draw(st.integers(1, 4))


def batches_of(dataset, batch_size, rank=0, world_size=1, position=0, seed=4, workers=0, shuffle=True, **options):
    config = StreamConfig(workers=workers, prefetch=2, shuffle=shuffle)
    plan = Plan(dataset, batch_size, world_size, seed, shuffle)
    max_length, negatives = options.get("max_length", LONG), options.get("negatives", NegativesConfig(per_target=3))
    return ready(TrainBatches(plan, rank, position, max_length, "mean", negatives, config), config, pin_memory=False)


def take(fed, count):
    """The next batches, of data in which nothing is damaged."""
    taken = list(itertools.islice(fed, count))
    fed.close()
    for one in taken:
        assert one.skipped == 0 and one.reasons == () and len(one.users_B) == one.batch.weight_B.sum()
    return [one.batch for one in taken]


def assert_same(one, other, path="batch"):
    """Equal down to the last tensor, dtypes included."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{path}.{field.name}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    else:
        assert one == other, path


@settings(max_examples=25)
@given(layouts(), st.integers(5, 12), st.integers(0, 3), st.booleans())
def test_every_world_size_sees_the_same_batches_and_every_user_once(layout, batch_size, epoch, shuffle):
    sizes, streams, block_users = layout
    histories = draw_histories(sum(sizes), longest=4)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(
            Path(folder) / "data", histories, cuts=np.cumsum(sizes)[:-1].tolist(), streams=streams, block_users=block_users
        )
        seen = {}
        for world_size in range(1, streams + 1):
            plan = Plan(dataset, batch_size, world_size, seed=1, shuffle=shuffle)
            steps = range(plan.steps(epoch))
            by_rank = [list(read_users(plan, epoch, steps, rank)) for rank in range(world_size)]
            assert all([step for step, _ in batches] == list(steps) for batches in by_rank)
            batches = []
            for step in steps:
                parts = [batches[step][1] for batches in by_rank]
                assert max(len(part.number_B) for part in parts) <= plan.users_per_rank(step)
                assert [len(part.number_B) for part in parts] == [plan.users(epoch, step, r) for r in range(world_size)]
                for part in parts:
                    ends = np.cumsum(part.lengths_B)
                    for number, begin, end in zip(part.number_B, ends - part.lengths_B, ends, strict=True):
                        assert part.items_N[begin:end].tolist() == histories[number].tolist()
                batches.append(sorted(np.concatenate([part.number_B for part in parts]).tolist()))
            assert sorted(itertools.chain(*batches)) == list(range(len(histories)))
            assert max(len(batch) for batch in batches) <= batch_size and batches[-1]
            seen[world_size] = batches
        assert all(batches == seen[1] for batches in seen.values())


@settings(max_examples=25)
@given(layouts(), st.integers(1, 9))
def test_unshuffled_batches_are_the_slots_of_the_streams_in_turn(layout, batch_size):
    sizes, streams, block_users = layout
    cuts = np.cumsum(sizes)[:-1].tolist()
    shards = [list(range(first, last)) for first, last in zip([0, *cuts], [*cuts, sum(sizes)], strict=True)]
    own = [list(itertools.chain(*shards[stream::streams])) for stream in range(streams)]
    slots = list(itertools.chain(*itertools.zip_longest(*own)))
    batches = [slots[begin : begin + batch_size] for begin in range(0, len(slots), batch_size)]
    batches = [sorted(user for user in batch if user is not None) for batch in batches]
    while not batches[-1]:
        batches.pop()
    with tempfile.TemporaryDirectory() as folder:
        histories = draw_histories(sum(sizes), longest=3)
        dataset = write_dataset(Path(folder) / "data", histories, cuts=cuts, streams=streams, block_users=block_users)
        plan = Plan(dataset, batch_size, 1, seed=1, shuffle=False)
        found = [sorted(users.number_B.tolist()) for _, users in read_users(plan, 0, range(plan.steps(0)), 0)]
    assert found == batches


def test_ranks_that_do_not_divide_the_streams_get_the_same_number_of_users(dataset):
    """Three streams on two ranks: rank 0 has twice the users of rank 1, which fills up."""
    filled = []
    for one, other in zip(*(take(batches_of(dataset, 8, rank, 2), 16) for rank in range(2)), strict=True):
        assert len(one.weight_B) == len(other.weight_B)
        for batch in (one, other):
            real = int(batch.weight_B.sum())
            assert batch.weight_B.tolist() == [1] * real + [0] * (len(batch.weight_B) - real)
        filled.append(len(other.weight_B) - int(other.weight_B.sum()))
    assert max(filled) > 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_batch_holds_each_users_training_part_and_its_own_negatives(dataset, world_size):
    """Whatever the other users of the batch are, and so at any world size, with histories cut to the model's length."""
    histories, max_length = draw_histories(57), 4
    alone = {}
    for rank in range(world_size):
        plan = Plan(dataset, 8, world_size, seed=4)
        batches = TrainBatches(plan, rank, 0, max_length, "mean", NegativesConfig(per_target=3), HERE)
        built = iter(batches)
        for epoch in range(2):
            for step, users in read_users(plan, epoch, range(plan.steps(epoch)), rank):
                fed, ids, negatives = next(built), [], []
                batch = fed.batch
                assert fed.users_B.dtype == np.int64 and fed.users_B.tolist() == users.number_B.tolist()
                for number in users.number_B:
                    history = histories[number]
                    one = batches.build(epoch, step, Users(np.array([number]), np.array([len(history)]), history))
                    kept = one.interactions - 2 * (len(one.weight_B) - 1)
                    own, drawn = one.ids[:kept], one.ids[one.interactions :].view(-1, 3)[:kept]
                    part = history[:-2] if len(history) > 2 else history
                    assert set(own.tolist()) <= set(part.tolist())
                    assert own[-max_length - 1 :].tolist() == part[-max_length - 1 :].tolist()
                    alone[epoch, number] = own.tolist(), drawn.tolist()
                    ids += own.tolist()
                    negatives += drawn.tolist()
                fill = 2 * (len(batch.weight_B) - len(users.number_B))
                assert batch.interactions == len(ids) + fill and batch.negatives == 3
                assert batch.ids[: len(ids)].tolist() == ids
                assert batch.ids[batch.interactions :].view(-1, 3)[: len(ids)].tolist() == negatives
                assert batch.domain_items == (5, 4)
    assert len(alone) == 2 * 57
    if world_size > 1:
        return
    assert any(alone[0, user][1] != alone[1, user][1] for user in range(57))  # drawn anew each epoch


def test_shared_negatives_are_those_of_the_step_on_every_rank(dataset):
    negatives = NegativesConfig(shared=3)
    runs = [
        take(batches_of(dataset, 8, rank, world_size, negatives=negatives), 9)
        for world_size in (1, 3)
        for rank in range(world_size)
    ]
    for batches in zip(*runs, strict=True):
        drawn = [batch.ids[batch.interactions :].tolist() for batch in batches]
        assert len(drawn[0]) == 6 and all(rows == drawn[0] for rows in drawn)
        assert all(batch.negatives is None and batch.negative_starts == (0, 3, 6) for batch in batches)
    assert len({tuple(batch.ids[batch.interactions :].tolist()) for batch in runs[0]}) > 1


@settings(max_examples=15)
@given(position=st.integers(0, 40), rank=st.integers(0, 1))
def test_a_run_goes_on_from_any_position(dataset, position, rank):
    whole = take(batches_of(dataset, 8, rank, 2), position + 3)
    assert_same(take(batches_of(dataset, 8, rank, 2, position), 3), whole[position:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_builds_the_same_batches(dataset, workers):
    """From the middle of an epoch into the third, so that workers cross its end at different places."""
    expected = take(batches_of(dataset, 8, 1, 2, position=5), 18)
    assert_same(take(batches_of(dataset, 8, 1, 2, position=5, workers=workers), 18), expected)


def orders(dataset, seed, shuffle=True):
    """The users of each of three epochs in their order."""
    plan = Plan(dataset, 8, 1, seed, shuffle)
    batches = [read_users(plan, epoch, range(plan.steps(epoch)), 0) for epoch in range(3)]
    return [tuple(int(number) for _, users in epoch for number in users.number_B) for epoch in batches]


def test_each_epoch_and_seed_has_its_own_order(dataset):
    found = orders(dataset, 1) + orders(dataset, 2)
    assert len(set(found)) == 6
    assert all(sorted(order) == list(range(57)) for order in found)
    # Shards move, and users within their block: of three users, one order in six is the same again.
    shards = [(0, 9), (9, 20), (21, 33), (33, 47)]
    blocks = [range(begin, min(begin + 3, last)) for first, last in shards for begin in range(first, last, 3)]
    within = [[sorted(block, key=order.index) for block in blocks] for order in found]
    for one, other in itertools.combinations(within, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < len(blocks) / 2
    places = [[min(order.index(user) for user in range(*shard)) for shard in shards] for order in found]
    assert len({tuple(np.argsort(place)) for place in places}) > 2


def test_without_shuffle_every_epoch_is_the_datasets_own_order(dataset):
    assert len(set(orders(dataset, 1, shuffle=False) + orders(dataset, 2, shuffle=False))) == 1


def test_locate_counts_steps_over_epochs(dataset):
    plan = Plan(dataset, 8, 1, seed=4)
    steps = [plan.steps(epoch) for epoch in range(4)]
    assert len(set(steps)) > 1  # uneven streams: the number of steps depends on the epoch
    expected = [(epoch, step) for epoch in range(4) for step in range(steps[epoch])]
    assert [plan.locate(position) for position in range(sum(steps))] == expected


def test_training_part_keeps_the_first_of_each_user():
    users = Users(np.array([7, 3, 9]), np.array([4, 2, 3]), np.arange(9))
    items, place, number = training_part(users, np.array([2, 2, 1]))
    assert items.tolist() == [0, 1, 4, 5, 6]
    assert place.tolist() == [0, 1, 0, 1, 0]
    assert number.tolist() == [7, 7, 3, 3, 9]


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 2), (3, 1), (4, 2), (9, 7)])
def test_training_leaves_out_the_last_two_of_who_can_be_split(dataset, length, kept):
    batches = TrainBatches(Plan(dataset, 8, 1, 4), 0, 0, LONG, "mean", NegativesConfig(), HERE)
    batch = batches.build(0, 0, Users(np.array([0]), np.array([length]), np.arange(length) % 5))
    assert batch.ids[:kept].tolist() == [item % 5 for item in range(kept)]
    assert batch.interactions - 2 * (len(batch.weight_B) - 1) == kept


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """The third of four shards has a byte changed; one stream, no shuffle: batches before it are good."""
    folder = tmp_path_factory.mktemp("spoiled") / "data"
    dataset = write_dataset(folder, draw_histories(16), cuts=(4, 8, 12))
    file = folder / dataset.shards[2].name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # beyond the archive's end: only the checksum tells
    file.write_bytes(content)
    return dataset


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_shard_arrives_from_a_worker_as_one_input_error(spoiled, workers, capfd):
    batches = batches_of(spoiled, 4, workers=workers, shuffle=False)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(InputError, match=r"000002\.tar: its sha256") as error:
        next(batches)
    assert error.value.one_rank
    assert next(batches, None) is None
    assert capfd.readouterr().err == ""


def test_checksums_can_be_left_unchecked(spoiled):
    plan = Plan(spoiled, 4, 1, 0, shuffle=False)
    with pytest.raises(InputError, match="sha256"):
        list(read_users(plan, 0, range(4), 0))
    assert len(list(read_users(plan, 0, range(4), 0, verify=False))) == 4


def test_more_ranks_than_streams_or_users_are_refused(dataset):
    with pytest.raises(InputError, match=r"4 ranks, but .*data has 3 streams.*--streams 4"):
        Plan(dataset, 8, 4, 0)
    with pytest.raises(InputError, match=r"global_batch_size=2 is below the number of ranks, 3"):
        Plan(dataset, 2, 3, 0)


class Cycle:
    """Collected by the garbage collector alone, which it tells by a file."""

    def __init__(self, folder):
        self.folder, self.itself = folder, self

    def __del__(self):
        (self.folder / str(os.getpid())).touch()


class Collecting(torch.utils.data.IterableDataset):
    def __iter__(self):
        gc.collect()
        yield os.getpid()


def test_a_worker_does_not_collect_what_its_parent_left(tmp_path):
    """The parent's garbage may be a process group, which waits for threads that a forked process does not have."""
    gc.collect()
    gc.disable()
    try:
        Cycle(tmp_path)
        (worker,) = ready(Collecting(), StreamConfig(workers=1), pin_memory=False)
        assert worker != os.getpid() and list(tmp_path.iterdir()) == []
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize(("key", "value"), [("workers", -1), ("prefetch", 0)])
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"stream\.{key} is {value}"):
        StreamConfig(**{key: value})
