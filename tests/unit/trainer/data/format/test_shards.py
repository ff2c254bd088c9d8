import hashlib
import io
import itertools
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.made import npy, read_tar, write_tar
from trainer.data.format.dataset import Dataset, Domain, Shard
from trainer.data.format.shards import (
    Block,
    ShardFile,
    read_blocks,
    write_shard,
)
from trainer.errors import InputError

ROWS = 100


def block(lengths, rows=ROWS):
    lengths = np.array(lengths, dtype=np.int32)
    number_N = np.arange(lengths.sum())
    return Block(
        lengths,
        (number_N * 7919 % rows).astype(np.int32),
        (number_N * 104_729 % 2**16).astype(np.uint16),
    )


def dataset_of(path, users, size=0, sha256="", rows=ROWS):
    """The facts around one shard of users that start at 10."""
    shard = Shard(path.name, users, 10, 0, size, sha256)
    domain = Domain("shop", 0, rows - 64, rows, users, 0, {}, "")
    return Dataset(
        path.parent, 0, users, 0, 0, 0, 0.0, 1.0, 3, 1, (domain,), (shard,), ()
    ), shard


def read(path, users, verify=False, **facts):
    return list(read_blocks(*dataset_of(path, users, **facts), verify=verify))


def zipped():
    stream = io.BytesIO()
    np.savez(stream, np.zeros(3, dtype=np.uint16))
    return stream.getvalue()


def assert_same(found, expected):
    for name, dtype in (
        ("lengths_B", np.int32),
        ("items_N", np.int32),
        ("ticks_N", np.uint16),
    ):
        assert getattr(found, name).dtype == dtype
        np.testing.assert_array_equal(
            getattr(found, name), getattr(expected, name)
        )


def test_blocks_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "000003.tar"
    blocks = [block([1, 5, 2]), block([3, 1, 70]), block([70])]
    size, sha256 = write_shard(path, 10, ROWS, iter(blocks))
    assert size == path.stat().st_size
    found = read(path, 7, verify=True, sha256=sha256)
    assert [first for first, _ in found] == [10, 13, 16]
    for (_, there), here in zip(found, blocks, strict=True):
        assert_same(there, here)
    with tarfile.open(path) as tar:
        names = [
            "crc32.npy",
            "items.high.zst",
            "items.low.npy",
            "lengths.npy",
            "ticks.zst",
        ]
        assert tar.getnames()[:5] == [f"000003-000000.{name}" for name in names]


def test_webdataset_reads_a_shard(tmp_path):
    path = tmp_path / "000003.tar"
    blocks = [block([1, 5, 2]), block([3, 1, 70])]
    write_shard(path, 10, ROWS, blocks)
    samples = list(
        webdataset.WebDataset(str(path), shardshuffle=False).decode()
    )
    assert [sample["__key__"] for sample in samples] == [
        "000003-000000",
        "000003-000001",
    ]
    for sample, written in zip(samples, blocks, strict=True):
        assert sample["lengths.npy"].tolist() == written.lengths_B.tolist()
        high = np.frombuffer(
            pa.Codec("zstd").decompress(
                sample["items.high.zst"], len(written.items_N)
            ),
            np.uint8,
        )
        assert (
            sample["items.low.npy"] + 2**16 * high.astype(int)
        ).tolist() == written.items_N.tolist()
        ticks = np.frombuffer(
            pa.Codec("zstd").decompress(sample["ticks.zst"], 2 * len(high)),
            "<u2",
        )
        assert (np.cumsum(ticks) % 2**16).tolist() == written.ticks_N.tolist()


@pytest.mark.parametrize(
    "rows", [100, 2**16, 2**16 + 1, 2**24, 2**24 + 1, 2**31 - 1]
)
@pytest.mark.parametrize("longest", [1, 255, 256, 70_000])
def test_rows_and_lengths_of_any_width_come_back(tmp_path, rows, longest):
    path = tmp_path / "000000.tar"
    items = np.concatenate(
        [
            [0, rows - 1, rows // 2, min(rows - 1, 65535)],
            np.arange(longest) % rows,
        ]
    ).astype(np.int32)
    written = Block(
        np.array([4, longest], np.int32),
        items,
        (items % 2**16).astype(np.uint16),
    )
    _, sha256 = write_shard(path, 10, rows, [written])
    ((_, found),) = read(path, 2, verify=True, sha256=sha256, rows=rows)
    assert_same(found, written)
    narrow = {1: "uint8", 255: "uint8", 256: "uint16", 70_000: "uint32"}[
        longest
    ]
    members = {
        name.partition(".")[2]: content
        for name, content in read_tar(path).items()
    }
    assert np.load(io.BytesIO(members["lengths.npy"])).dtype == narrow
    high = pa.Codec("zstd").decompress(
        members["items.high.zst"], (4 + longest) * (1 + (rows > 2**24))
    )
    assert len(high) == (4 + longest) * (1 + (rows > 2**24))


@settings(max_examples=20)
@given(st.permutations(range(4)), st.booleans())
def test_blocks_may_be_read_in_any_order_and_again(
    tmp_path_factory, order, verify
):
    path = tmp_path_factory.mktemp("any") / "000000.tar"
    blocks = [
        block([1, 5, 2]),
        block([3, 1, 70]),
        block([7, 7, 7]),
        block([70]),
    ]
    _, sha256 = write_shard(path, 10, ROWS, blocks)
    file = ShardFile(*dataset_of(path, 10, sha256=sha256), verify=verify)
    assert (file.first_user, file.count) == (10, 4)
    for number in itertools.chain(order, order):
        assert_same(file.block(number), blocks[number])
    file.close()


def test_a_shard_that_is_open_stays_readable_when_its_file_is_taken_away(
    tmp_path,
):
    """A cache may remove what it has fetched while another process still reads."""
    path = tmp_path / "000000.tar"
    blocks = [block([1, 5, 2]), block([3])]
    write_shard(path, 10, ROWS, blocks)
    file = ShardFile(*dataset_of(path, 4), verify=False)
    path.unlink()
    assert_same(file.block(1), blocks[1])


def test_a_closed_shard_lets_its_file_go(tmp_path):
    path = tmp_path / "000000.tar"
    write_shard(path, 10, ROWS, [block([1, 5, 2])])
    before = len(os.listdir("/proc/self/fd"))
    files = [ShardFile(*dataset_of(path, 3), verify=False) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    for file in files:
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_equal_blocks_give_equal_bytes_whatever_their_integers(tmp_path):
    wide = block([1, 5])
    wide = Block(
        wide.lengths_B.astype(np.int64),
        wide.items_N.astype(np.int64),
        wide.ticks_N.astype(np.int64),
    )
    facts = []
    for folder, blocks in (("a", [block([1, 5])]), ("b", [wide])):
        (tmp_path / folder).mkdir()
        facts.append(
            write_shard(tmp_path / folder / "000000.tar", 10, ROWS, blocks)
        )
    assert facts[0] == facts[1]


def test_any_changed_byte_is_found_before_the_first_block(tmp_path):
    path = tmp_path / "000000.tar"
    _, sha256 = write_shard(path, 10, ROWS, [block([4, 4])])
    good = path.read_bytes()
    for position in (0, 600, len(good) // 2, len(good) - 1):
        path.write_bytes(
            good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
        )
        with pytest.raises(InputError, match=r"000000\.tar.*sha256"):
            next(read_blocks(*dataset_of(path, 2, sha256=sha256)))


FIRST = "000000-000000"


def members_of(
    lengths=(2, 1),
    low=(5, 6, 7),
    high=bytes(3),
    ticks=None,
    dtypes=("u1", "<u2"),
    drop=(),
    block=FIRST,
    first=10,
):
    """The members of one block, its checksum that of what it holds; what is given as bytes goes in as it is."""
    packed = [
        pa.Codec("zstd").compress(each, asbytes=True)
        if isinstance(each, bytes)
        else each.raw
        for each in (high, bytes(2 * len(low)) if ticks is None else ticks)
    ]
    contents = {
        "lengths.npy": lengths
        if isinstance(lengths, bytes)
        else npy(np.array(lengths, dtypes[0])),
        "items.low.npy": low
        if isinstance(low, bytes)
        else npy(np.array(low, dtypes[1])),
        "items.high.zst": packed[0],
        "ticks.zst": packed[1],
    }
    checksum = zlib.crc32(
        b"".join([struct.pack("<q", first), *contents.values()])
    )
    contents["crc32.npy"] = npy(np.array([checksum], "<u4"))
    return {
        f"{block}.{name}": content
        for name, content in contents.items()
        if name not in drop
    }


class Raw:
    """High parts or ticks as they stand in the file."""

    def __init__(self, raw):
        self.raw = raw


ALL = ["lengths.npy", "items.low.npy", "items.high.zst", "ticks.zst"]
NOT_THOSE = "lengths are not those of 2 users with"
BAD = {
    "a member is missing": (
        members_of(drop=["lengths.npy"]),
        "lengths.npy is missing",
    ),
    "low parts are missing": (
        members_of(drop=["items.low.npy"]),
        "items.low.npy is missing",
    ),
    "high parts are missing": (
        members_of(drop=["items.high.zst"]),
        "items.high.zst is missing",
    ),
    "no member at all": ({}, "block 0 is missing"),
    "a checksum alone": (members_of(drop=ALL), "lengths.npy is missing"),
    "another shard's block": (
        members_of(block="000001-000000"),
        "'000001-000000' is none of its 1 blocks",
    ),
    "a block too many": (
        members_of(block="000000-000001"),
        "'000000-000001' is none of its 1 blocks",
    ),
    "lengths of int32": (
        members_of(dtypes=("<i4", "<u2")),
        "lengths.npy is int32",
    ),
    "lengths of float": (
        members_of(dtypes=("<f4", "<u2")),
        "lengths.npy is float32",
    ),
    "items of int64": (
        members_of(dtypes=("u1", "<i8")),
        "items.low.npy is int64",
    ),
    "items of int16": (
        members_of(dtypes=("u1", "<i2")),
        "items.low.npy is int16",
    ),
    "big-endian items": (
        members_of(dtypes=("u1", ">u2")),
        "items.low.npy is >u2",
    ),
    "big-endian lengths": (
        members_of(dtypes=(">u2", "<u2")),
        "lengths.npy is >u2",
    ),
    "two axes": (members_of(low=[[5, 6, 7]]), "2 axes"),
    "an object array": (
        members_of(low=npy(np.array([{}], dtype=object), allow_pickle=True)),
        "items.low.npy is object",
    ),
    "a zip": (members_of(low=zipped()), "items.low.npy is no array"),
    "no npy": (members_of(low=b"hello"), "items.low.npy is no array"),
    "nothing in a member": (members_of(low=b""), "items.low.npy is no array"),
    "an array cut short": (
        members_of(low=npy(np.arange(3, dtype="<u2"))[:-2]),
        "has 3 values, but holds 4 bytes",
    ),
    "too many items": (members_of(low=[5, 6, 7, 8], high=bytes(4)), NOT_THOSE),
    "too few items": (members_of(low=[5, 6], high=bytes(2)), NOT_THOSE),
    "a user without items": (members_of(lengths=[3, 0]), NOT_THOSE),
    "fewer lengths than users": (members_of(lengths=[3]), NOT_THOSE),
    "more lengths than users": (members_of(lengths=[1, 1, 1]), NOT_THOSE),
    "lengths that add up beyond 32 bits": (
        members_of(lengths=[2**32 - 1, 4], dtypes=("<u4", "<u2")),
        NOT_THOSE,
    ),
    "a row beyond M": (members_of(low=[5, ROWS, 7]), "outside the 100 rows"),
    "a row far beyond M": (
        members_of(high=bytes([0, 1, 0])),
        "outside the 100 rows",
    ),
    "too few high parts": (members_of(high=bytes(2)), "items.high.zst "),
    "too many high parts": (members_of(high=bytes(4)), "items.high.zst "),
    "far too many high parts": (
        members_of(high=bytes(2**28)),
        "items.high.zst ",
    ),
    "ticks are missing": (
        members_of(drop=["ticks.zst"]),
        "ticks.zst is missing",
    ),
    "too few ticks": (members_of(ticks=bytes(4)), "ticks.zst "),
    "far too many ticks": (members_of(ticks=bytes(2**28)), "ticks.zst "),
    "ticks that are no frame": (
        members_of(ticks=Raw(b"hello")),
        "ticks.zst cannot be unpacked",
    ),
    "high parts that are no frame": (
        members_of(high=Raw(b"hello")),
        "items.high.zst cannot be unpacked",
    ),
    "nothing for high parts": (members_of(high=Raw(b"")), "items.high.zst "),
    "a frame cut short": (
        members_of(
            high=Raw(pa.Codec("zstd").compress(bytes(3), asbytes=True)[:-2])
        ),
        "items.high.zst ",
    ),
}


@pytest.mark.parametrize(("members", "named"), BAD.values(), ids=BAD)
def test_a_shard_that_cannot_be_used_is_named_even_where_its_checksum_is_not_asked_for(
    tmp_path, members, named
):
    path = tmp_path / "000000.tar"
    write_tar(path, members)
    with pytest.raises(InputError) as error:
        read(path, 2)
    assert "000000.tar" in str(error.value) and named in str(error.value)


def test_the_table_of_bad_shards_starts_from_a_good_one(tmp_path):
    path = tmp_path / "000000.tar"
    write_tar(path, members_of())
    for verify in (True, False):
        assert (
            len(
                read(
                    path,
                    2,
                    verify,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                )
            )
            == 1
        )


@pytest.mark.parametrize("drop", [["crc32.npy"], []])
def test_a_blocks_own_checksum_is_asked_for_with_the_shards(tmp_path, drop):
    """The shard is as dataset.json says, but was written with a block that is not as its checksum says."""
    path, members = tmp_path / "000000.tar", members_of(drop=drop)
    members["000000-000000.items.low.npy"] = npy(np.array([5, 6, 8], "<u2"))
    write_tar(path, members)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        InputError,
        match=r"000000\.tar: block 0: .*"
        + ("crc32.npy is missing" if drop else "CRC-32"),
    ):
        read(path, 2, verify=True, sha256=sha256)
    ((first, found),) = read(path, 2, verify=False)
    assert first == 10 and found.items_N.tolist() == [5, 6, 8]


def test_a_block_in_the_place_of_another_is_found(tmp_path):
    """Its checksum covers which users it is of, which nothing else in it says."""
    path = tmp_path / "000000.tar"
    write_tar(path, members_of(first=13))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        InputError,
        match=r"000000\.tar: block 0: its checksum \(CRC-32\) is wrong",
    ):
        read(path, 2, verify=True, sha256=sha256)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"x" * 2000),
        Path.unlink,
        lambda path: path.write_bytes(b""),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_no_tar_is_named(tmp_path, spoil, verify):
    path = tmp_path / "000000.tar"
    _, sha256 = write_shard(path, 10, ROWS, [block([4, 4])])
    spoil(path)
    with pytest.raises(InputError, match=r"000000\.tar"):
        read(path, 2, verify=verify, sha256=sha256)
