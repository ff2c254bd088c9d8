import dataclasses
import gc
import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.made import draw_histories, draw_ticks, write_dataset
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import MEASURED, StreamConfig
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import UserHistories, read_users
from trainer.data.loading.stream import (
    BatchFeed,
    TrainBatches,
    batches_of_workers,
    count_workers_needed,
    find_domains,
    select_training_part,
)
from trainer.errors import InputError

LONG = 100  # tokens: more than any history here
HERE = StreamConfig(workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """57 users in 6 uneven shards, 3 streams: with batches of 8 users, seven or eight steps an epoch."""
    histories = draw_histories(57)
    return write_dataset(
        tmp_path_factory.mktemp("stream") / "data",
        histories,
        cuts=(9, 20, 21, 33, 47),
        streams=3,
    )


def batches_of(
    dataset,
    batch_size,
    rank=0,
    world_size=1,
    position=0,
    seed=4,
    workers=0,
    shuffle=True,
    **options,
):
    config = StreamConfig(
        workers=workers,
        prefetch=2,
        shuffle=shuffle,
        domain=options.get("domain", ""),
    )
    max_length, negatives = (
        options.get("max_length", LONG),
        options.get("negatives", NegativesConfig(per_target=3, shared=0)),
    )
    limits = {
        "tokens_per_batch": options.get("tokens", 0),
        "balance": options.get("balance", True),
    }
    plan = BatchSchedule(
        dataset,
        batch_size,
        world_size,
        seed,
        shuffle,
        max_length=max_length,
        **limits,
    )
    return batches_of_workers(
        TrainBatches(
            plan, rank, position, max_length, "mean", negatives, config
        ),
        config,
        pin_memory=False,
    )


def take(fed, count):
    """The next batches, of data in which nothing is damaged."""
    taken = list(itertools.islice(fed, count))
    fed.close()
    for one in taken:
        assert (
            one.skipped == 0
            and one.reasons == ()
            and len(one.users_B) == one.batch.weight_B.sum()
        )
    return [one.batch for one in taken]


def assert_same(one, other, path="batch"):
    """Equal down to the last tensor, dtypes included."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(
                getattr(one, field.name),
                getattr(other, field.name),
                f"{path}.{field.name}",
            )
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    else:
        assert one == other, path


@pytest.mark.parametrize("balance", [True, False])
def test_ranks_that_do_not_divide_the_streams_get_the_same_number_of_users(
    dataset, balance
):
    """Three streams on two ranks: unless they are evened out rank 0 has twice the users of rank 1, which fills up."""
    filled = []
    for one, other in zip(
        *(
            take(batches_of(dataset, 8, rank, 2, balance=balance), 16)
            for rank in range(2)
        ),
        strict=True,
    ):
        assert len(one.weight_B) == len(other.weight_B)
        for batch in (one, other):
            real = int(batch.weight_B.sum())
            assert batch.weight_B.tolist() == [1] * real + [0] * (
                len(batch.weight_B) - real
            )
        filled.append(len(other.weight_B) - int(other.weight_B.sum()))
    assert max(filled) <= 1 if balance else max(filled) > 1


def users_of(numbers, histories):
    lengths_B, items_N = (
        np.array(list(map(len, histories))),
        np.concatenate(histories),
    )
    return UserHistories(
        np.array(numbers),
        lengths_B,
        items_N,
        np.concatenate(draw_ticks(histories)),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_batch_holds_each_users_training_part_and_its_own_negatives(
    dataset, world_size
):
    """Whatever the other users of the batch are, and so at any world size, with histories cut to the model's length."""
    histories, max_length = draw_histories(57), 4
    alone = {}
    for rank in range(world_size):
        plan = BatchSchedule(
            dataset, 8, world_size, seed=4, max_length=max_length
        )
        batches = TrainBatches(
            plan,
            rank,
            0,
            max_length,
            "mean",
            NegativesConfig(per_target=3, shared=0),
            HERE,
        )
        built = iter(batches)
        for epoch in range(2):
            for step, users in read_users(
                plan, epoch, range(plan.steps(epoch)), rank
            ):
                fed, ids, negatives = next(built), [], []
                batch = fed.batch
                assert (
                    fed.users_B.dtype == np.int64
                    and fed.users_B.tolist() == users.number_B.tolist()
                )
                for number in users.number_B:
                    history = histories[number]
                    one = batches.build(
                        epoch, step, users_of([number], [history])
                    )
                    kept = one.interactions - 2 * (len(one.weight_B) - 1)
                    own, drawn = (
                        one.ids[:kept],
                        one.ids[one.interactions :].view(-1, 3)[:kept],
                    )
                    part = history[:-2] if len(history) > 2 else history
                    assert set(own.tolist()) <= set(part.tolist())
                    assert (
                        own[-max_length - 1 :].tolist()
                        == part[-max_length - 1 :].tolist()
                    )
                    alone[epoch, number] = own.tolist(), drawn.tolist()
                    ids += own.tolist()
                    negatives += drawn.tolist()
                fill = 2 * (len(batch.weight_B) - len(users.number_B))
                assert (
                    batch.interactions == len(ids) + fill
                    and batch.negatives == 3
                )
                assert batch.ids[: len(ids)].tolist() == ids
                assert (
                    batch.ids[batch.interactions :]
                    .view(-1, 3)[: len(ids)]
                    .tolist()
                    == negatives
                )
                assert batch.domain_items == (5, 4)
    assert len(alone) == 2 * 57
    if world_size > 1:
        return
    assert any(
        alone[0, user][1] != alone[1, user][1] for user in range(57)
    )  # drawn anew each epoch


@settings(max_examples=12)
@given(
    world_size=st.integers(1, 3),
    batch_size=st.integers(3, 9),
    balance=st.booleans(),
    negatives=st.sampled_from(
        [NegativesConfig(per_target=2, shared=0), NegativesConfig(shared=3)]
    ),
    domain=st.sampled_from(["", "domain 1"]),
    max_length=st.sampled_from([1, 6]),
)
def test_who_only_fills_up_looks_up_nothing(
    dataset, world_size, batch_size, balance, negatives, domain, max_length
):
    """A rank's rows are those of its real users, and the negatives that all ranks share; in every step of an epoch."""
    options = {
        "negatives": negatives,
        "domain": domain,
        "max_length": max_length,
        "balance": balance,
    }
    steps = BatchSchedule(dataset, batch_size, world_size, 4).steps(0)
    for rank in range(world_size):
        for batch in take_any(
            batches_of(dataset, batch_size, rank, world_size, **options), steps
        ):
            fill = int((batch.weight_B == 0).sum())
            own = (
                len(batch.inverse) - batch.interactions
                if batch.negatives is None
                else 0
            )
            real = (
                torch.arange(batch.interactions) < batch.interactions - 2 * fill
            )
            if own:
                counted = torch.cat([real, torch.ones(own, dtype=torch.bool)])
            else:
                counted = torch.cat(
                    [real, real.repeat_interleave(batch.negatives)]
                )
            assert batch.distinct.tolist() == sorted(
                {int(batch.distinct[place]) for place in batch.inverse[counted]}
            )
            vectors = batch.gather_vectors(
                torch.arange(1.0, len(batch.distinct) + 1).unsqueeze(1)
            )
            assert (
                vectors.shape == (len(batch.inverse), 1)
                and (vectors[counted] > 0).all()
            )
            assert batch.reduce_gradient(vectors).shape == (
                len(batch.distinct),
                1,
            )


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_who_stands_for_all_is_the_same_at_any_number_of_ranks(
    dataset, size, balance
):
    """The candidates of a step by domain, in their order; each has the domain, and there are others in the next step."""
    histories = draw_histories(57)
    steps = BatchSchedule(dataset, 8, 1, 4).steps(0)
    lists = []
    for world_size in (1, 2, 3):
        by_place = [{} for _ in range(steps)]
        for rank in range(world_size):
            plan = BatchSchedule(dataset, 8, world_size, 4, balance=balance)
            batches = TrainBatches(
                plan,
                rank,
                0,
                LONG,
                "mean",
                NegativesConfig(shared=0),
                HERE,
                size,
            ).from_position(0)
            for number, fed in zip(range(steps), batches, strict=False):
                users_U, _ = plan.batch(0, number)
                if len(users_U) <= size:
                    assert fed.batch.candidates is None
                    continue
                candidates = fed.batch.candidates
                assert candidates.size == size
                for slot, place in zip(
                    candidates.slot_C.tolist(),
                    candidates.place_C.tolist(),
                    strict=True,
                ):
                    user, domain = fed.users_B[slot // 2], slot % 2
                    assert (
                        place not in by_place[number]
                        and place // size == domain
                    )
                    assert domain in find_domains(
                        dataset,
                        histories[user][:-2]
                        if len(histories[user]) > 2
                        else histories[user],
                    )
                    by_place[number][place] = int(user)
        lists.append(by_place)
    assert lists[0] == lists[1] == lists[2]
    plan = BatchSchedule(dataset, 8, 1, 4)
    for number, by_place in enumerate(lists[0]):
        users_U, _ = plan.batch(0, number)
        with_domain = (dataset.lengths[users_U] > 0).sum(0)
        taken = (
            np.minimum(with_domain, size)
            if len(users_U) > size
            else np.zeros(2, int)
        )
        assert len(by_place) == taken.sum()
    batches = TrainBatches(
        plan, 0, 0, LONG, "mean", NegativesConfig(shared=0), HERE
    )
    assert all(
        fed.batch.candidates is None
        for _, fed in zip(range(steps), batches, strict=False)
    )


def take_any(fed, count):
    batches = [one.batch for one in itertools.islice(fed, count)]
    fed.close()
    return batches


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
        assert all(
            batch.negatives is None and batch.negative_starts == (0, 3, 6)
            for batch in batches
        )
    assert (
        len(
            {
                tuple(batch.ids[batch.interactions :].tolist())
                for batch in runs[0]
            }
        )
        > 1
    )


@settings(max_examples=15)
@given(
    position=st.integers(0, 40),
    rank=st.integers(0, 1),
    tokens=st.sampled_from([0, 30]),
)
def test_a_run_goes_on_from_any_position(dataset, position, rank, tokens):
    options = {"tokens": tokens, "max_length": 6}
    whole = take(batches_of(dataset, 8, rank, 2, **options), position + 3)
    assert_same(
        take(batches_of(dataset, 8, rank, 2, position, **options), 3),
        whole[position:],
    )


@pytest.mark.ranks
@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores
@pytest.mark.parametrize(
    ("workers", "tokens"), [(1, 0), (2, 0), (3, 0), (2, 40)]
)
def test_any_number_of_workers_builds_the_same_batches(
    dataset, workers, tokens
):
    """From the middle of an epoch into the third, so that workers cross its end at different places."""
    options = {"position": 5, "tokens": tokens, "max_length": 7}
    expected = take(batches_of(dataset, 8, 1, 2, **options), 18)
    assert_same(
        take(batches_of(dataset, 8, 1, 2, workers=workers, **options), 18),
        expected,
    )


def test_a_batch_has_no_more_tokens_than_allowed(dataset):
    """A token is an interaction of the training part, a user's newest five; both ranks together."""
    limit, longest = 24, 5
    ranks = [
        take(
            batches_of(dataset, 8, rank, 2, tokens=limit, max_length=longest),
            30,
        )
        for rank in range(2)
    ]
    totals = []
    for batches in zip(*ranks, strict=True):
        totals.append(0)
        for batch in batches:
            counts = np.bincount(
                batch.cross.sequence_M, minlength=len(batch.weight_B)
            )
            totals[-1] += int((counts * (batch.weight_B > 0).numpy()).sum())
    assert max(totals) <= limit and np.mean(totals) > 0.8 * limit


class Looked:
    """A TrainBatches that notes from where on it was read, and how."""

    def __init__(self, batches, started):
        self.config, self.position, self._batches, self._started = (
            batches.config,
            batches.position,
            batches,
            started,
        )

    def from_position(self, position):
        self._started.append(position)
        return self._batches.from_position(position)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_are_as_many_as_it_takes_to_keep_up(dataset, monkeypatch):
    """However often the loader begins anew, every batch comes once and in order."""
    expected = take(batches_of(dataset, 8, position=3), 40)
    plan, config = (
        BatchSchedule(dataset, 8, 1, seed=4, max_length=LONG),
        StreamConfig(prefetch=2),
    )
    assert config.workers == MEASURED
    for step_seconds, cores, workers in (
        (1e-9, 3, 3),
        (1e9, 3, 1),
        (1e-9, 1, 1),
    ):
        started = []
        batches = TrainBatches(
            plan,
            0,
            3,
            LONG,
            "mean",
            NegativesConfig(per_target=3, shared=0),
            config,
        )
        feed = BatchFeed(
            Looked(batches, started), pin_memory=False, cores=cores
        )
        found, lines = [], []
        for _ in range(40):
            fed = next(feed)
            assert fed.seconds > 0
            found.append(fed.batch)
            lines.append(feed.computed(step_seconds))
        feed.close()
        assert_same(found, expected)
        assert feed.workers == workers and feed.position == 43
        (line,) = [line for line in lines if line]
        assert ("for want of cores" in line) == (step_seconds < 1)
        assert started == (
            [3, 3 + 1 + lines.index(line)] if workers > 1 else [3]
        )


@pytest.mark.ranks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_given_number_of_workers_stays(dataset, workers):
    config = StreamConfig(workers=workers, prefetch=2)
    plan = BatchSchedule(dataset, 8, 1, seed=4, max_length=LONG)
    feed = BatchFeed(
        TrainBatches(
            plan,
            0,
            0,
            LONG,
            "mean",
            NegativesConfig(per_target=3, shared=0),
            config,
        ),
        pin_memory=False,
        cores=8,
    )
    for _ in range(40):
        next(feed)
        assert feed.computed(1e-9) is None
    feed.close()
    assert feed.workers == workers


@pytest.mark.ranks
def test_a_feed_hands_over_what_stops_it(spoiled):
    config = StreamConfig(prefetch=1)
    plan = BatchSchedule(spoiled, 4, 1, 4, shuffle=False)
    feed = BatchFeed(
        TrainBatches(
            plan, 0, 0, LONG, "mean", NegativesConfig(shared=0), config
        ),
        pin_memory=False,
        cores=2,
    )
    assert len([next(feed), next(feed)]) == 2
    with pytest.raises(InputError, match=r"000002\.tar: its sha256"):
        next(feed)


@pytest.mark.parametrize(
    ("build", "step", "workers"),
    [
        (0.1, 1.0, 1),
        (0.8, 1.0, 1),
        (0.81, 1.0, 2),
        (1.0, 1.0, 2),
        (3.0, 0.5, 8),
        (0.0, 0.0, 1),
    ],
)
def test_a_quarter_more_workers_than_the_mean_asks_for(build, step, workers):
    assert count_workers_needed(build, step) == workers


@pytest.mark.parametrize("domains", [1, 2, 30])
def test_domains_are_the_datasets(dataset, domains):
    owned = tuple(
        dataclasses.replace(dataset.domains[0], start=8 * number)
        for number in range(domains)
    )
    whole = dataclasses.replace(dataset, domains=owned)
    rows = np.arange(8 * domains, dtype=np.int32)[::-1].copy()
    assert find_domains(whole, rows).tolist() == whole.domain_of(rows).tolist()


def test_the_training_part_is_what_comes_before_the_newest_two(dataset):
    users = users_of([7, 3, 9], [[0, 9, 1, 2], [9, 8], [3, 9, 4]])
    found = [part.tolist() for part in select_training_part(dataset, users)]
    assert found == [[7, 3, 9], [2, 2, 1], [0, 1, 4, 5, 6], [0, 1, 0, 1, 0]]


def test_one_domain_alone_is_cut_out_of_the_training_part(dataset):
    """Domain 0's rows are 0 to 4. Not the newest two of its own, but what is left of the newest two of all."""
    users = users_of(
        [7, 3, 9, 5], [[0, 9, 1, 2], [9, 8], [3, 9, 4], [9, 1, 2, 8, 0]]
    )
    found = [
        part.tolist()
        for part in select_training_part(dataset, users, "domain 0")
    ]
    assert found == [[7, 9, 5], [1, 1, 2], [0, 6, 10, 11], [0, 0, 1, 2]]


@pytest.mark.parametrize(
    "negatives",
    [NegativesConfig(shared=3), NegativesConfig(per_target=2, shared=0)],
)
def test_a_batch_of_one_domain_holds_nothing_else(dataset, negatives):
    histories, seen = draw_histories(57), {}
    batches = batches_of(
        dataset, 8, 0, 1, negatives=negatives, domain="domain 1"
    )
    for fed in itertools.islice(
        batches, BatchSchedule(dataset, 8, 1, 4).steps(0)
    ):
        batch = fed.batch
        counted = batch.cross.target_weight_L > 0
        assert set(batch.cross.target_domain_L[counted].tolist()) <= {1}
        assert set(
            find_domains(
                dataset, batch.ids[batch.interactions :].numpy()
            ).tolist()
        ) <= {0, 1}
        if negatives.shared:
            assert batch.negative_starts == (0, 0, 3)
        real = int(batch.weight_B.sum())
        own = batch.ids[
            : batch.interactions - 2 * (len(batch.weight_B) - real)
        ].tolist()
        parts = {}
        for user in map(int, fed.users_B):
            history = histories[user]
            parts[user] = [
                row
                for row in (history[:-2] if len(history) > 2 else history)
                if row >= 8
            ]
        assert own == [
            int(row) for user in fed.users_B for row in parts[int(user)]
        ]
        assert real == sum(map(bool, parts.values()))
        seen |= parts
    assert len(seen) == 57


def test_a_domain_that_is_not_there_is_named(dataset):
    with pytest.raises(InputError, match="'moon' is not in the dataset"):
        batches_of(dataset, 8, 0, 1, domain="moon")


@pytest.mark.parametrize(
    "negatives",
    [NegativesConfig(shared=3), NegativesConfig(per_target=2, shared=0)],
)
def test_a_token_predicts_for_the_time_of_its_target(dataset, negatives):
    """With histories cut to the model's length; who only fills up is left out."""
    histories = draw_histories(57)
    ticks = draw_ticks(histories)
    for fed in itertools.islice(
        batches_of(dataset, 8, negatives=negatives, max_length=4), 7
    ):
        view = fed.batch.cross
        for place, user in enumerate(map(int, fed.users_B)):
            part = ticks[user][:-2] if len(ticks[user]) > 2 else ticks[user]
            asked = view.target_time_M[view.sequence_M == place].tolist()
            assert asked == part[-4:].tolist()
        targets = view.target_time_M[view.target_token_L.long()]
        assert len(targets) == len(view.target_interaction_L) and targets.any()


@pytest.mark.parametrize(
    ("length", "kept"), [(1, 1), (2, 2), (3, 1), (4, 2), (9, 7)]
)
def test_training_leaves_out_the_last_two_of_who_can_be_split(
    dataset, length, kept
):
    batches = TrainBatches(
        BatchSchedule(dataset, 8, 1, 4),
        0,
        0,
        LONG,
        "mean",
        NegativesConfig(shared=0),
        HERE,
    )
    batch = batches.build(0, 0, users_of([0], [np.arange(length) % 5]))
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


@pytest.mark.ranks
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_shard_arrives_from_a_worker_as_one_input_error(
    spoiled, workers, capfd
):
    batches = batches_of(spoiled, 4, workers=workers, shuffle=False)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(InputError, match=r"000002\.tar: its sha256") as error:
        next(batches)
    assert error.value.one_rank
    assert next(batches, None) is None
    assert capfd.readouterr().err == ""


def test_checksums_can_be_left_unchecked(spoiled):
    plan = BatchSchedule(spoiled, 4, 1, 0, shuffle=False)
    with pytest.raises(InputError, match="sha256"):
        list(read_users(plan, 0, range(4), 0))
    assert len(list(read_users(plan, 0, range(4), 0, verify=False))) == 4


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


@pytest.mark.ranks
def test_a_worker_does_not_collect_what_its_parent_left(tmp_path):
    """The parent's garbage may be a process group, which waits for threads that a forked process does not have."""
    gc.collect()
    gc.disable()
    try:
        Cycle(tmp_path)
        (worker,) = batches_of_workers(
            Collecting(), StreamConfig(workers=1), pin_memory=False
        )
        assert worker != os.getpid() and list(tmp_path.iterdir()) == []
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


class Small:
    f_blocks, f_bavail, f_frsize = 4, 4, 2**10


@pytest.mark.ranks
def test_what_loaders_need_of_shared_memory_is_looked_at_before_the_first_batch(
    dataset, monkeypatch
):
    monkeypatch.setattr(
        "trainer.data.loading.worker_handover.os.statvfs", lambda path: Small
    )
    with pytest.raises(
        InputError,
        match=r"/dev/shm has 4 KiB, .* the loaders need .* \(1 ranks x 6 batches x ",
    ):
        next(batches_of(dataset, 8, workers=2))
    assert next(batches_of(dataset, 8, workers=0))


@pytest.mark.parametrize(("key", "value"), [("workers", -2), ("prefetch", 0)])
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"stream\.{key} is {value}"):
        StreamConfig(**{key: value})
