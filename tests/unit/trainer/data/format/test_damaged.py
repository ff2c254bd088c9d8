"""Datasets that are damaged, or made to do harm: each is found, and named or skipped, wherever it is read."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from tests.helpers.made import (
    draw_histories,
    npy,
    read_tar,
    spoil_block,
    write_dataset,
    write_tar,
)
from tests.unit.trainer.data.loading.test_stream import assert_same
from trainer.config.load import load_config
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import UserHistories, read_users
from trainer.data.loading.stream import TrainBatches, batches_of_workers
from trainer.errors import InputError

USERS, SEED, BATCH = 40, 4, 7
HISTORIES = draw_histories(USERS)
BAD_SHARD = "000001.tar"  # users 10 to 19 in blocks of 3, 3, 3 and 1
WHOLE = range(10, 20)
SKIP, STOP = (
    StreamConfig(workers=0, damaged=damaged) for damaged in ("skip", "stop")
)


def make(folder):
    """Forty users in four shards of two streams."""
    return write_dataset(
        folder / "data", HISTORIES, cuts=(10, 20, 30), streams=2
    )


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return make(tmp_path_factory.mktemp("intact"))


MEMBERS = {
    "lengths": "lengths.npy",
    "low": "items.low.npy",
    "high": "items.high.zst",
}
MEMBERS |= {"ticks": "ticks.zst", "crc32": "crc32.npy"}


def name_of(block, member):
    return f"000001-{block:06d}.{MEMBERS[member]}"


def members(first=13, **changes):
    """Spoils a shard by putting members of block 1 in the place of its own, with the checksum of what it then holds; None takes
    one out. first: the block's first user, as the checksum has it."""

    def spoil(path):
        found = read_tar(path)
        found |= {
            name_of(1, member): content
            for member, content in changes.items()
            if content is not None
        }
        gone = [
            name_of(1, member)
            for member, content in changes.items()
            if content is None
        ]
        if "crc32" not in changes:
            held = [
                found[name_of(1, member)]
                for member in ("lengths", "low", "high", "ticks")
            ]
            checksum = zlib.crc32(b"".join([struct.pack("<q", first), *held]))
            found[name_of(1, "crc32")] = npy(np.array([checksum], "<u4"))
        write_tar(
            path,
            {
                name: content
                for name, content in found.items()
                if name not in gone
            },
        )

    return spoil


def block(
    first=13,
    lengths=(1, 2, 1),
    items=(0, 1, 2, 3),
    high_dtype="u1",
    length_dtype="u1",
    high=None,
):
    """Spoils a shard by another block 1. high: its bytes as they are, instead of the items'."""
    items = np.array(items, "<u4")
    if high is None:
        high = zstd((items >> 16).astype(high_dtype).tobytes())
    low, ticks = npy(items.astype("<u2")), zstd(bytes(2 * len(items)))
    return members(
        first,
        lengths=npy(np.array(lengths, length_dtype)),
        low=low,
        high=high,
        ticks=ticks,
    )


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def header(shape, descr="<u2", text=None):
    """An array of three numbers below the header of another."""
    text = (
        text
        or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    )
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", len(text) + 1)
        + text.encode()
        + b"\n"
        + np.arange(3, dtype="<u2").tobytes()
    )


def order(blocks):
    """Spoils a shard by having its blocks in another order; one may come twice."""

    def spoil(path):
        found = read_tar(path).items()
        write_tar(
            path,
            [
                member
                for number in blocks
                for member in found
                if f"-{number:06d}." in member[0]
            ],
        )

    return spoil


def exchange(path):
    """Block 1 under the name of block 2, and the other way round."""
    found, other = read_tar(path), {"1": "2", "2": "1"}
    write_tar(
        path,
        {
            name: found[
                f"000001-00000{other.get(name[12], name[12])}{name[13:]}"
            ]
            for name in found
        },
    )


def at(block, array, change, within=0):
    """Spoils the bytes of a shard from so far into a member's content on: change(file's content, offset)."""

    def spoil(path):
        with tarfile.open(path) as tar:
            offset = tar.getmember(name_of(block, array)).offset_data + within
        path.write_bytes(change(path.read_bytes(), offset))

    return spoil


def cut(content, offset):
    return content[:offset]


def zeros(content, offset):
    return content[:offset] + bytes(1024)


def flip(content, offset):
    return (
        content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]
    )


def resize(size, kind=tarfile.REGTYPE):
    """Gives the member another size, or kind, in its header, whose own checksum is right."""

    def change(content, offset):
        info = tarfile.TarInfo(name_of(2, "lengths"))
        info.size, info.type = size, kind
        return (
            content[: offset - 512]
            + info.tobuf(tarfile.GNU_FORMAT)
            + content[offset:]
        )

    return change


def link(path):
    """Block 1's items are a link to a file of the machine."""
    info = tarfile.TarInfo(name_of(1, "low"))
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(path, read_tar(path) | {info.name: info})


def sparse(size, unpacked):
    """Turns the member into a sparse one, which is so long in the tar and so long when it is read."""

    def change(content, offset):
        info = tarfile.TarInfo(name_of(1, "low"))
        info.size, info.type = size, tarfile.GNUTYPE_SPARSE
        buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        buffer[386:410] = b"%011o\0%011o\0" % (
            0,
            512,
        )  # one piece of 512 bytes at 0
        buffer[483:495] = b"%011o\0" % unpacked
        buffer[148:156] = b" " * 8
        buffer[148:156] = b"%06o\0 " % sum(buffer)
        return content[: offset - 512] + buffer + content[offset:]

    return change


def instead(content):
    """Spoils a shard by another file in its place."""
    return lambda path: path.write_bytes(
        content(path) if callable(content) else content
    )


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


class Payload:
    """Unpickled, it makes the file that the environment names."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def pickled():
    return npy(np.array([Payload()], dtype=object), allow_pickle=True)


ONE, REST = range(13, 16), range(16, 20)
# What spoils the shard; the users that are then skipped; what is said; False where only checksums can tell.
CASES = {
    "a bit of the items": (at(1, "low", flip, 130), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "a bit of the high parts": (at(1, "high", flip, 12), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "a bit of the lengths": (at(1, "lengths", flip, 128), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "a bit of the checksum": (at(1, "crc32", flip, 128), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "no checksum": (members(crc32=None), ONE, "the member crc32.npy is missing", False),
    "a bit between the members": (at(1, "crc32", flip, 500), (), "its sha256 is not the one", False),
    "a bit of an array's header": (at(1, "low", flip, 3), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "an array that is none": (members(low=b"hello" * 40), ONE, "items.low.npy is no array that can be read", True),
    "a member is missing": (members(lengths=None), ONE, "the member lengths.npy is missing", True),
    "high parts are missing": (members(high=None), ONE, "the member items.high.zst is missing", True),
    "ticks are missing": (members(ticks=None), ONE, "the member ticks.zst is missing", True),
    "ticks that are no frame": (members(ticks=b"hello"), ONE, "ticks.zst cannot be unpacked", True),
    "a bit of the ticks": (at(1, "ticks", flip, 0), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "no member of a block": (order([0, 2, 3]), ONE, "block 1 is missing", True),
    "no member of the first two": (order([2, 3]), range(10, 16), "blocks 0 to 1 are missing", True),
    "no member of the last": (order([0, 1, 2]), (19,), "block 3 is missing", True),
    "nothing but the end": (order([]), WHOLE, "blocks 0 to 3 are missing", True),
    "a block twice": (order([0, 1, 2, 3, 1]), (), "'000001-000001' is none of its 4 blocks, or out of turn", True),
    "blocks in another order": (order([0, 2, 1, 3]), ONE, "block 1 is missing", True),
    "blocks by each other's names": (exchange, range(13, 19), "block 1: its checksum (CRC-32) is wrong", False),
    "a member twice": (
        lambda path: write_tar(path, [m for m in read_tar(path).items() for _ in range(1 + (m[0] == name_of(1, "low")))]),
        ONE, "the member items.low.npy is there twice", True,
    ),
    "lengths of int32": (block(length_dtype="<i4"), ONE, "lengths.npy is int32 with 1 axes, not uint8 or uint16", True),
    "lengths of float": (block(length_dtype="<f8"), ONE, "lengths.npy is float64 with 1 axes", True),
    "items of float64": (members(low=npy(np.zeros(4))), ONE, "items.low.npy is float64 with 1 axes, not uint16", True),
    "big-endian items": (members(low=npy(np.zeros(4, ">u2"))), ONE, "items.low.npy is >u2 with 1 axes, not uint16", True),
    "items of two axes": (members(low=npy(np.zeros((2, 2), "<u2"))), ONE, "items.low.npy is uint16 with 2 axes", True),
    "a pickled object": (members(low=pickled()), ONE, "items.low.npy is object with 1 axes", True),
    "pickled lengths": (members(lengths=pickled()), ONE, "lengths.npy is object with 1 axes", True),
    "a bare pickle": (members(low=pickle.dumps(Payload())), ONE, "items.low.npy is no array", True),
    "a pickle for high parts": (members(high=pickle.dumps(Payload())), ONE, "items.high.zst cannot be unpacked", True),
    "a pickled checksum": (members(crc32=pickled()), ONE, "crc32.npy is object with 1 axes", False),
    "an array of 2^60": (members(low=header((2**60,))), ONE, "has 1152921504606846976 values, but holds 6 bytes", True),
    "an array of −3": (members(low=header((-3,))), ONE, "has -3 values, but holds 6 bytes", True),
    "an array without a header": (members(low=header(3, text="(" * 5000)), ONE, "items.low.npy is no array", True),
    "lengths that do not add up": (block(lengths=(1, 2, 2)), ONE, "block 1: lengths are not those of 3 users with 4", True),
    "lengths that add up beyond 2^32": (
        block(lengths=(2**32 - 1, 3, 2), length_dtype="<u4"), ONE, "block 1: lengths are not those of 3 users", True
    ),
    "a user without items": (block(lengths=(2, 2, 0)), ONE, "block 1: lengths are not those of 3 users", True),
    "a row beyond M": (block(items=(0, 1, 2, 15)), ONE, "block 1: an item is outside the 15 rows", True),
    "a row far beyond M": (block(items=(0, 1, 2, 3 + 2**23)), ONE, "block 1: an item is outside the 15 rows", True),
    "other users": (block(first=20), ONE, "block 1: its checksum (CRC-32) is wrong", False),
    "a user too few": (block(lengths=(2, 2)), ONE, "block 1: lengths are not those of 3 users with 4 items", True),
    "a user too many": (block(lengths=(1, 1, 1, 1)), ONE, "block 1: lengths are not those of 3 users with 4 items", True),
    "high parts of too few": (block(high=zstd(bytes(3))), ONE, "block 1: items.high.zst ", True),
    "high parts of too many": (block(high=zstd(bytes(5))), ONE, "block 1: items.high.zst ", True),
    "high parts that become 2^30 bytes": (block(high=zstd(bytes(2**30))), ONE, "block 1: items.high.zst ", True),
    "high parts cut short": (block(high=zstd(bytes(4))[:-3]), ONE, "block 1: items.high.zst cannot be unpacked", True),
    "nothing for high parts": (block(high=b""), ONE, "block 1: items.high.zst ", True),
    "high parts of two bytes": (block(high_dtype="<u2"), ONE, "block 1: items.high.zst ", True),
    "cut in a member": (at(2, "low", cut, 130), REST, "'000001-000002.items.low.npy' is sparse or reaches beyond", True),
    "cut in a header": (at(2, "crc32", cut, -300), REST, "blocks 2 to 3 are missing", True),
    "cut between blocks": (at(2, "crc32", cut, -512), REST, "blocks 2 to 3 are missing", True),
    "an early end": (at(2, "crc32", zeros, -512), REST, "blocks 2 to 3 are missing", True),
    "a header that is none": (at(2, "crc32", flip, -500), REST, "blocks 2 to 3 are missing", True),
    "a size beyond the file": (at(2, "lengths", resize(2**40)), REST, "lengths.npy' is sparse or reaches beyond", True),
    "a size below 0": (at(2, "lengths", resize(-512)), REST, "lengths.npy' is sparse or reaches beyond", True),
    "an extension of 2^50": (at(2, "lengths", resize(2**50, tarfile.XHDTYPE)), REST, "it cannot be read", True),
    "a link": (link, ONE, "the member items.low.npy is missing", True),
    "a sparse member": (at(1, "low", sparse(512, 2**32)), range(13, 20), "'000001-000001.items.low.npy' is sparse", True),
    "a sparse circle": (at(1, "low", sparse(-512, 512)), range(13, 20), "'000001-000001.items.low.npy' is sparse", True),
    "no file": (Path.unlink, WHOLE, "it is missing or no file", True),
    "a folder": (a_folder, WHOLE, "it is missing or no file", True),
    "a pipe": (a_pipe, WHOLE, "it is missing or no file", True),
    "an empty file": (instead(b""), WHOLE, "it cannot be read (empty file)", True),
    "no tar": (instead(b"x" * 5000), WHOLE, "it cannot be read", True),
    "a compressed tar": (instead(lambda path: gzip.compress(path.read_bytes())), WHOLE, "it cannot be read", True),
    "another shard": (
        instead(lambda path: path.with_name("000002.tar").read_bytes()), WHOLE, "'000002-000000' is none of its 4 blocks", True
    ),
}  # fmt: skip


# One for each set of users that is skipped. Who reads, and from where on, does not see what the damage was.
BY_USERS = (
    "a bit between the members",
    "a bit of the items",
    "no member of the first two",
    "no member of the last",
    "blocks by each other's names",
    "a sparse member",
    "cut in a member",
    "no file",
)
KINDS = [
    name if name in BY_USERS else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


@pytest.fixture(scope="module")
def damaged(request, tmp_path_factory):
    """(dataset, users skipped, words of the line that says so, whether it is told without checksums)."""
    spoil, *expected = CASES[request.param]
    dataset = make(tmp_path_factory.mktemp("damaged"))
    spoil(dataset.folder / "shards" / BAD_SHARD)
    return dataset, *expected


def of_all_kinds(test):
    """Of each kind of damage."""
    return pytest.mark.parametrize("damaged", CASES, indirect=True)(test)


def of_all_users(test):
    """Of each set of users that is skipped; every kind of damage under `slow`."""
    return pytest.mark.parametrize("damaged", KINDS, indirect=True)(test)


def feed(
    dataset,
    config,
    rank=0,
    world_size=1,
    position=0,
    steps=None,
    batch_size=BATCH,
):
    """Two epochs of what one rank is fed, or so many steps, from a position on."""
    plan = BatchSchedule(dataset, batch_size, world_size, SEED)
    fed = batches_of_workers(
        TrainBatches(
            plan,
            rank,
            position,
            100,
            "mean",
            NegativesConfig(per_target=3, shared=0),
            config,
        ),
        config,
        pin_memory=False,
    )
    steps = plan.steps(0) + plan.steps(1) - position if steps is None else steps
    taken = list(itertools.islice(fed, steps))
    fed.close()
    return taken


def everyone(dataset, verify=True):
    """All users of an unshuffled epoch as they are read where damage is refused."""
    plan = BatchSchedule(dataset, BATCH, 1, SEED, shuffle=False)
    return [
        int(user)
        for _, users in read_users(plan, 0, range(plan.steps(0)), 0, verify)
        for user in users.number_B
    ]


def reseal(dataset):
    """The dataset as if the shard had been so when it was prepared."""
    path = dataset.folder / "shards" / BAD_SHARD
    if not path.is_file():
        return dataset
    facts = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    shards = [
        dataclasses.replace(
            shard, **facts if Path(shard.name).name == BAD_SHARD else {}
        )
        for shard in dataset.shards
    ]
    return dataclasses.replace(dataset, shards=tuple(shards))


def refusal(read, *arguments):
    """The one line by which reading is refused."""
    with pytest.raises(InputError) as error:
        read(*arguments)
    message = str(error.value)
    assert (
        message.isprintable()
        and BAD_SHARD in message
        and "prepare the dataset again" in message
    )
    return message


@of_all_kinds
def test_damage_stops_and_is_named(damaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, _, named, told = damaged
    message = refusal(everyone, dataset)
    assert (
        "its sha256 is not the one in dataset.json" in message
        or named in message
    )
    # Where the sha256 is that of the damaged file, each member still has to hold what it should.
    if named.startswith("its sha256"):
        assert everyone(reseal(dataset)) == everyone(dataset, verify=False)
    else:
        assert named in refusal(everyone, reseal(dataset))
    if told:
        assert named in refusal(everyone, dataset, False)
    assert list(tmp_path.iterdir()) == []  # nothing was unpickled


@of_all_kinds
def test_damage_skips_its_users_and_no_one_else(
    intact, damaged, tmp_path, monkeypatch
):
    """Batch for batch, the others are fed as they are from the dataset without damage, over two epochs."""
    monkeypatch.chdir(tmp_path)
    assert_skips(intact, damaged, 0)
    assert list(tmp_path.iterdir()) == []  # nothing was unpickled


@pytest.mark.ranks
@of_all_users
def test_worker_processes_skip_the_same_users(
    intact, damaged, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_skips(intact, damaged, 2)
    assert list(tmp_path.iterdir()) == []  # nothing was unpickled


def assert_skips(intact, damaged, workers):
    """What is fed is what the dataset without damage has of the other users."""
    dataset, missing, named, told = damaged
    plan = BatchSchedule(intact, BATCH, 1, SEED)
    build = TrainBatches(
        plan, 0, 0, 100, "mean", NegativesConfig(per_target=3, shared=0), STOP
    ).build
    found = feed(dataset, dataclasses.replace(SKIP, workers=workers))
    expected = [
        (epoch, *read)
        for epoch in (0, 1)
        for read in read_users(plan, epoch, range(plan.steps(epoch)), 0)
    ]
    for fed, (epoch, step, users) in zip(found, expected, strict=True):
        left = without(users, missing)
        assert fed.users_B.tolist() == left.number_B.tolist()
        assert fed.skipped == len(users.number_B) - len(left.number_B)
        assert_same(
            move(fed.batch, "cpu"), move(build(epoch, step, left), "cpu")
        )
        assert fed.batch.weight_B.sum() == len(left.number_B)
    assert sum(fed.skipped for fed in found) == 2 * len(missing)
    reasons = [reason for fed in found for reason in fed.reasons]
    assert any(named in reason for reason in reasons)
    assert all(
        BAD_SHARD in reason and reason.isprintable() for reason in reasons
    )
    assert len(reasons) <= max(1, workers) * len(
        set(reasons)
    )  # no worker says the same twice
    said = [f"user {user} is" for user in missing] + [
        f"{a} to {b} are" for a in missing for b in missing if a < b
    ]
    assert any(
        f"{words} skipped" in reason for words in said for reason in reasons
    ) == bool(missing)
    if told and not workers:
        unverified = feed(dataset, dataclasses.replace(SKIP, verify=False))
        assert [fed.users_B.tolist() for fed in unverified] == [
            fed.users_B.tolist() for fed in found
        ]


def without(users, missing):
    keep_B = ~np.isin(users.number_B, list(missing))
    keep_N = np.repeat(keep_B, users.lengths_B)
    return UserHistories(
        users.number_B[keep_B],
        users.lengths_B[keep_B],
        users.items_N[keep_N],
        users.ticks_N[keep_N],
    )


@pytest.mark.ranks
@of_all_users
@pytest.mark.parametrize(("position", "workers"), [(0, 0), (3, 2), (8, 0)])
def test_the_same_users_are_skipped_by_two_ranks_and_after_resuming(
    damaged, position, workers
):
    dataset = damaged[0]
    config = dataclasses.replace(SKIP, workers=workers)
    alone = feed(dataset, SKIP)[position:]
    ranks = [feed(dataset, config, rank, 2, position) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) > 2
    for fed, *parts in zip(alone, *ranks, strict=True):
        assert sorted(fed.users_B.tolist()) == sorted(
            user for part in parts for user in part.users_B.tolist()
        )
        assert fed.skipped == sum(part.skipped for part in parts)
        assert len({len(part.batch.weight_B) for part in parts}) == 1


def test_the_table_of_damage_starts_from_a_good_dataset(intact):
    assert sorted(everyone(intact)) == list(range(USERS))
    fed = feed(intact, SKIP)
    assert sum(len(one.users_B) for one in fed) == 2 * USERS
    assert all(one.skipped == 0 and one.reasons == () for one in fed)
    for spoil in (
        members(),
        block(),
    ):  # what the spoilers write is a shard in order
        path = intact.folder / "shards" / BAD_SHARD
        content = path.read_bytes()
        spoil(path)
        assert sorted(everyone(reseal(intact))) == list(range(USERS))
        path.write_bytes(content)


@pytest.mark.ranks
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "case",
    [
        "a bit of the items",
        "a row beyond M",
        "a size below 0",
        "no file",
        "a pickled object",
    ],
)
def test_a_worker_hands_its_refusal_over(tmp_path, case, workers, capfd):
    dataset = make(tmp_path)
    CASES[case][0](dataset.folder / "shards" / BAD_SHARD)
    refusal(feed, dataset, dataclasses.replace(STOP, workers=workers))
    assert capfd.readouterr().err == ""


def test_a_batch_without_any_user_keeps_its_place_and_moves_nothing(tmp_path):
    dataset = make(tmp_path)
    for shard in dataset.shards[1:]:
        (dataset.folder / shard.name).unlink()
    assert Dataset.load(dataset.folder, check_shards=False) == dataset
    fed = feed(dataset, SKIP, batch_size=2)
    nobody = [one for one in fed if not len(one.users_B)]
    assert nobody and all(
        one.skipped == 2 and one.batch.weight_B.tolist() == [0, 0]
        for one in nobody
    )
    assert sum(one.skipped for one in fed) == 2 * 30
    model, batch = SyNCRec(ModelConfig(dim=8, ffn_dim=8), 2), nobody[0].batch
    assert len(batch.distinct) == 0  # Adam would move a row that is looked up
    rows = torch.randn(len(batch.inverse), 8, requires_grad=True)
    loss, _ = model(batch, rows)
    loss.backward()
    gradients = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    assert loss == 0 and all(
        (gradient == 0).all() for gradient in [rows.grad, *gradients]
    )


def test_several_damaged_shards_are_each_said_once(tmp_path):
    """Over two epochs: the same block is met again, and said no more."""
    dataset = make(tmp_path)
    spoil_block(dataset, shard=0, block=2)
    spoil_block(dataset, shard=2, block=0)
    (dataset.folder / dataset.shards[3].name).unlink()
    fed = feed(dataset, SKIP)
    reasons = [reason for one in fed for reason in one.reasons]
    assert len(reasons) == len(set(reasons)) == 5
    assert sum(one.skipped for one in fed) == 2 * (3 + 3 + 10)


def test_pinned_memory_is_the_batchs_own(intact, monkeypatch):
    (fed,) = feed(intact, SKIP, steps=1)
    pinned = []
    monkeypatch.setattr(
        type(fed.batch),
        "pin_memory",
        lambda batch: pinned.append(batch) or "pinned",
    )
    found = fed.pin_memory()
    assert found.batch == "pinned" and pinned == [fed.batch]
    assert (found.users_B is fed.users_B) and (
        found.skipped,
        found.reasons,
    ) == (0, ())


def test_hostile_facts_are_refused_before_any_shard_is_read(tmp_path):
    """A dataset.json that claims more than there is: one line, in either way of treating damage."""
    dataset = make(tmp_path)
    path = dataset.folder / "dataset.json"
    facts = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            facts
            | {
                "shards": [
                    shard | {"name": "../data/" + shard["name"]}
                    for shard in facts["shards"]
                ]
            }
        )
    )
    for check_shards in (True, False):
        with pytest.raises(
            InputError,
            match=r"'\.\./data/shards/000000\.tar' is no name of a file in this folder",
        ):
            Dataset.load(dataset.folder, check_shards)


def test_the_config_knows_two_ways():
    assert load_config([], []).stream.damaged == "stop"
    assert load_config([], ["stream.damaged=skip"]).stream.damaged == "skip"
    with pytest.raises(InputError, match=r"stream\.damaged=ignore"):
        load_config([], ["stream.damaged=ignore"])
