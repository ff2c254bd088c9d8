import errno
import hashlib
import itertools
import os
import resource
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncrec.batch import compiled
from tests.helpers.made import draw_histories, spoil_block, write_dataset
from trainer.config.stream import SourceConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading import histories as module
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories, read_users
from trainer.errors import InputError

USERS = 57
HISTORIES = draw_histories(USERS)


def make(folder, streams=3):
    """57 users in 6 uneven shards of blocks of 3."""
    return write_dataset(
        Path(folder) / "data",
        HISTORIES,
        cuts=(9, 20, 21, 33, 47),
        streams=streams,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make(tmp_path_factory.mktemp("histories"))


def by_user(users):
    """The histories that were read: [(number, rows)]."""
    ends = np.cumsum(users.lengths_B)
    begins = ends - users.lengths_B
    return [
        (int(n), users.items_N[b:e].tolist())
        for n, b, e in zip(users.number_B, begins, ends, strict=True)
    ]


def expected(numbers):
    return [(number, HISTORIES[number].tolist()) for number in numbers]


@pytest.fixture
def decoded(monkeypatch):
    """Every block that is decoded, in order: (shard's first user, block)."""
    seen = []
    block = module.ShardFile.block

    def noted(file, number):
        seen.append((file.first_user, number))
        return block(file, number)

    monkeypatch.setattr(module.ShardFile, "block", noted)
    return seen


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, USERS - 1), max_size=30), max_size=5),
    st.integers(1, 8),
    st.booleans(),
)
def test_any_users_are_read_in_the_order_asked_for(
    dataset, asked, blocks, by_numpy
):
    """Also one twice, whatever room there is, with a compiler and without."""
    histories = Histories(dataset, blocks)
    for numbers in asked:
        with pytest.MonkeyPatch.context() as patch:
            if by_numpy:
                patch.setattr(compiled, "why_missing", lambda: "not wanted")
            users = histories.read(np.array(numbers, np.int64))
        assert by_user(users) == expected(numbers)
        assert users.ticks_N.dtype == np.uint16
        assert (
            users.number_B.dtype,
            users.lengths_B.dtype,
            users.items_N.dtype,
        ) == (
            np.int64,
            np.int64,
            np.int32,
        )
    histories.close()


def test_a_block_is_decoded_once_while_there_is_room(dataset, decoded):
    histories = Histories(dataset, blocks=2)
    for numbers in (
        [0, 1],
        [2, 0],
        [3],
        [1, 4],
    ):  # blocks 0 and 1 of the first shard
        assert by_user(histories.read(np.array(numbers))) == expected(numbers)
    assert decoded == [(0, 0), (0, 1)]
    histories.read(np.array([0]))  # now the newest: block 1 goes
    histories.read(np.array([6]))
    histories.read(np.array([0]))
    assert decoded[2:] == [(0, 2)]
    histories.read(np.array([3]))
    assert decoded[3:] == [(0, 1)]


def test_one_read_decodes_a_block_once_even_without_room(dataset, decoded):
    numbers = [place + 3 * block for place in range(3) for block in range(3)]
    histories = Histories(dataset, blocks=1)
    assert by_user(histories.read(np.array(numbers))) == expected(numbers)
    assert sorted(decoded) == [(0, 0), (0, 1), (0, 2)]
    histories.read(np.array([8]))  # what came last is kept
    assert len(decoded) == 3


def test_an_epoch_decodes_every_block_of_a_rank_once(dataset, decoded):
    plan = BatchSchedule(dataset, 8, 1, seed=3)
    for _ in read_users(plan, 0, range(plan.steps(0)), 0):
        pass
    assert (
        len(decoded)
        == len(set(decoded))
        == sum(-(-shard.users // 3) for shard in dataset.shards)
    )


def test_memory_and_open_files_are_bounded(dataset, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_FILES", 2)
    histories = Histories(dataset, blocks=4)
    before = len(os.listdir("/proc/self/fd"))
    for number in np.random.default_rng(0).integers(0, USERS, 200):
        assert by_user(histories.read(np.array([number]))) == expected([number])
        assert len(histories._blocks) <= 4
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    histories.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_blocks_leave_their_users_out_and_are_said_once(tmp_path):
    dataset = make(tmp_path)
    spoil_block(dataset, shard=1, block=1)  # users 12 to 14
    (dataset.folder / dataset.shards[4].name).unlink()  # users 33 to 46
    said = []
    histories = Histories(dataset, 3, report=said.append)
    missing = {*range(12, 15), *range(33, 47)}
    for numbers in (
        [11, 12, 13, 15],
        [14],
        [],
        [33, 0, 46],
        list(range(USERS))[::-1],
        [12, 40, 1],
    ):
        users = histories.read(np.array(numbers, np.int64))
        assert by_user(users) == expected(
            [number for number in numbers if number not in missing]
        )
    assert len(said) == len(set(said)) == 3  # a sha256, a block, a file
    with pytest.raises(InputError, match=r"000001\.tar: its sha256"):
        Histories(dataset, 3).read(np.array([9]))
    # Without the sha256 a block's own checksum is left out too, as it always was.
    assert (
        len(Histories(dataset, 3, verify=False).read(np.array([12])).number_B)
        == 1
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("balance", [True, False])
def test_all_ranks_together_read_everyone(dataset, world_size, balance):
    plan = BatchSchedule(dataset, 8, world_size, seed=3, balance=balance)
    found = []
    for rank in range(world_size):
        for _, users in read_users(plan, 1, range(plan.steps(1)), rank):
            found += by_user(users)
    assert sorted(found) == expected(range(USERS))


def test_a_rank_that_others_give_users_to_decodes_few_blocks_more(
    tmp_path, decoded
):
    """Balance moves users of one stream a rank: blocks that are met again and again, and kept."""
    with tempfile.TemporaryDirectory() as folder:
        histories = draw_histories(960, longest=40)
        dataset = write_dataset(
            Path(folder) / "data",
            histories,
            cuts=range(60, 960, 60),
            streams=16,
            block_users=60,
        )
        plan = BatchSchedule(dataset, 240, 4, seed=3, max_length=30)
        for rank in range(4):
            decoded.clear()
            home = {
                dataset.shards[shard].first_user
                for stream in plan.shards(0)[rank::4]
                for shard in stream
            }
            away = 0
            for _, users in read_users(plan, 0, range(plan.steps(0)), rank):
                away += sum(
                    60 * (number // 60) not in home
                    for number in users.number_B.tolist()
                )
            assert away and len(decoded) == len(set(decoded))
            assert len(decoded) <= 4 + 2 * 3  # two streams of each other rank


def test_each_shard_is_hashed_by_its_home_rank_alone(tmp_path, monkeypatch):
    """Others, who take over some of its users, check the blocks that they read."""
    histories = draw_histories(960, longest=40)
    dataset = write_dataset(
        tmp_path / "data",
        histories,
        cuts=range(60, 960, 60),
        streams=16,
        block_users=60,
    )
    plan = BatchSchedule(dataset, 240, 8, seed=3, max_length=30)
    hashed, opened = Counter(), Counter()
    digest = hashlib.file_digest

    def noted(stream, name):
        hashed[os.path.basename(stream.name)] += 1
        return digest(stream, name)

    def opening(dataset, shard, *arguments):
        opened[shard.name] += 1
        return module.ShardFile(dataset, shard, *arguments)

    monkeypatch.setattr("trainer.data.format.shards.hashlib.file_digest", noted)
    for rank in range(8):
        reading = Histories.of_schedule(plan, open_shard=opening)
        for step in range(plan.steps(0)):
            reading.read(plan.users(0, step, rank), plan.home_shards(0, rank))
        reading.close()
    assert sum(opened.values()) > 20
    assert sorted(hashed.values()) == [1] * 16


def test_a_foreign_shard_is_compared_once_it_is_at_home(tmp_path):
    """A byte beside its blocks: their checksums know nothing of it."""
    dataset = make(tmp_path)
    path = dataset.folder / dataset.shards[1].name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    histories = Histories(dataset, 4)
    assert by_user(histories.read(np.array([0, 9, 10]), {0})) == expected(
        [0, 9, 10]
    )
    with pytest.raises(InputError, match=r"000001\.tar: its sha256"):
        histories.read(np.array([15]), {1})
    histories.close()
    said = []
    skipping = Histories(dataset, 4, report=said.append)
    for home in ({0}, {1}, {1}):
        for numbers in ([9], [15]):
            assert by_user(skipping.read(np.array(numbers), home)) == expected(
                numbers
            )
    assert len(said) == 1 and "its sha256 is not the one" in said[0]
    skipping.close()


@pytest.fixture
def few_files():
    """few_files(n): this process may open so many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(more):
        names = os.listdir(
            "/proc/self/fd"
        )  # one of them is of the listing itself
        taken = {
            int(name)
            for name in names
            if os.path.exists(f"/proc/self/fd/{name}")
        }
        free = itertools.filterfalse(taken.__contains__, itertools.count())
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (next(itertools.islice(free, more, None)), hard),
        )

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("skips", [False, True])
def test_where_few_files_may_be_open_older_ones_are_closed(
    dataset, few_files, skips
):
    said = []
    histories = Histories(dataset, 1, report=said.append if skips else None)
    few_files(2)
    for numbers in ([0, 10, 20, 30, 40, 50], [50, 40, 30], [9, 55, 20]):
        assert by_user(histories.read(np.array(numbers))) == expected(numbers)
    assert said == []
    histories.close()


@pytest.mark.parametrize("skips", [False, True])
def test_no_file_at_all_is_no_damage(dataset, few_files, skips):
    said = []
    histories = Histories(dataset, 1, report=said.append if skips else None)
    few_files(0)
    with pytest.raises(
        InputError,
        match=r"000000\.tar cannot be opened: too many files .* may have \d+: .*ulimit -n",
    ):
        histories.read(np.array([0]))
    assert said == []


@pytest.mark.ranks
def test_no_file_for_the_cache_is_said_as_such(dataset, tmp_path, few_files):
    """And not as a folder that cannot be written."""
    address = f"pipe:cat {dataset.folder}/{{}}"
    histories = Histories(
        Dataset.load(address, source_config=SourceConfig(cache=str(tmp_path))),
        1,
    )
    few_files(0)
    with pytest.raises(
        InputError, match=r"cannot be opened: too many files are open"
    ):
        histories.read(np.array([0]))


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT]
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_a_disk_or_mount_that_does_not_answer_is_no_damage(
    dataset, monkeypatch, number, when
):
    """Where damage is skipped too: its users are sound, and there again in a moment."""

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    said = []
    histories = Histories(dataset, 1, report=said.append)
    if when == "reading":
        assert len(histories.read(np.array([0])).number_B) == 1
        monkeypatch.setattr("trainer.data.format.shards.os.pread", fails)
    else:
        monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(
        InputError,
        match=r"000000\.tar cannot be read \(.*\): look after its disk or mount",
    ):
        histories.read(np.array([5]))
    monkeypatch.undo()
    assert said == []
    histories.close()
