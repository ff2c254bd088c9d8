import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.made import npy, write_tar
from trainer.data.dataset import Dataset, Domain, Shard
from trainer.data.shards import Block, read_blocks, write_shard
from trainer.errors import InputError

ROWS = 100


def block(first, lengths):
    lengths = np.array(lengths, dtype=np.int32)
    users = np.arange(first, first + len(lengths), dtype=np.int64)
    return Block(users, lengths, np.arange(lengths.sum(), dtype=np.int32) % ROWS)


def dataset_of(path, users, size=0, sha256=""):
    """The facts around one shard of users that start at 10."""
    shard = Shard(path.name, users, 10, 0, size, sha256)
    domain = Domain("shop", 0, ROWS - 64, ROWS, users, 0, {}, "")
    return Dataset(path.parent, 0, users, 0, 0, 0, 3, 1, (domain,), (shard,)), shard


def read(path, users, verify=False, **facts):
    return list(read_blocks(*dataset_of(path, users, **facts), verify=verify))


def zipped():
    stream = io.BytesIO()
    np.savez(stream, np.zeros(3, dtype=np.int32))
    return stream.getvalue()


def test_blocks_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "000003.tar"
    blocks = [block(10, [1, 5, 2]), block(13, [3, 1, 70]), block(16, [70])]
    size, sha256 = write_shard(path, iter(blocks))
    assert size == path.stat().st_size
    found = read(path, 7, verify=True, sha256=sha256)
    assert len(found) == 3
    for there, here in zip(found, blocks, strict=True):
        for name in ("users_B", "lengths_B", "items_N"):
            assert getattr(there, name).dtype == getattr(here, name).dtype
            np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    with tarfile.open(path) as tar:
        assert tar.getnames()[:4] == [f"000003-000000.{name}.npy" for name in ("crc32", "items", "lengths", "users")]


def test_equal_blocks_give_equal_bytes_whatever_their_integers(tmp_path):
    wide = block(10, [1, 5])
    wide = Block(wide.users_B.astype(np.int32), wide.lengths_B.astype(np.int64), wide.items_N.astype(np.int64))
    facts = []
    for folder, blocks in (("a", [block(10, [1, 5])]), ("b", [wide])):
        (tmp_path / folder).mkdir()
        facts.append(write_shard(tmp_path / folder / "000000.tar", blocks))
    assert facts[0] == facts[1]


def test_any_changed_byte_is_found_before_the_first_block(tmp_path):
    path = tmp_path / "000000.tar"
    _, sha256 = write_shard(path, [block(10, [4, 4])])
    good = path.read_bytes()
    for position in (0, 600, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(InputError, match=r"000000\.tar.*sha256"):
            next(read_blocks(*dataset_of(path, 2, sha256=sha256)))


def members_of(users=(10, 11), lengths=(2, 1), items=(5, 6, 7), dtypes=("<i8", "<i4", "<i4"), drop=(), block="000000-000000"):
    """The members of one block, its checksum that of what it holds; an array given as bytes goes in as it is."""
    given = dict(zip(("users", "lengths", "items"), zip((users, lengths, items), dtypes, strict=True), strict=True))
    arrays = {name: array if isinstance(array, bytes) else np.array(array, dtype) for name, (array, dtype) in given.items()}
    checksum = zlib.crc32(b"".join(array if isinstance(array, bytes) else array.tobytes() for array in arrays.values()))
    arrays["crc32"] = np.array([checksum], "<u4")
    return {
        f"{block}.{name}.npy": array if isinstance(array, bytes) else npy(array)
        for name, array in arrays.items()
        if name not in drop
    }


BAD = {
    "a member is missing": (members_of(drop=["lengths"]), "lengths.npy is missing"),
    "no member at all": ({}, "block 0 is missing"),
    "a checksum alone": (members_of(drop=["users", "lengths", "items"]), "users.npy is missing"),
    "another shard's block": (members_of(block="000001-000000"), "'000001-000000' is none of its 1 blocks"),
    "a block too many": (members_of(block="000000-000001"), "'000000-000001' is none of its 1 blocks"),
    "users of int32": (members_of(dtypes=("<i4", "<i4", "<i4")), "users.npy is int32"),
    "lengths of float": (members_of(dtypes=("<i8", "<f4", "<i4")), "lengths.npy is float32"),
    "items of int64": (members_of(dtypes=("<i8", "<i4", "<i8")), "items.npy is int64"),
    "big-endian items": (members_of(dtypes=("<i8", "<i4", ">i4")), "items.npy is >i4"),
    "two axes": (members_of(items=[[5, 6, 7]]), "2 axes"),
    "an object array": (members_of(items=npy(np.array([{}], dtype=object), allow_pickle=True)), "items.npy is object"),
    "a zip": (members_of(items=zipped()), "items.npy is no array"),
    "no npy": (members_of(items=b"hello"), "items.npy is no array"),
    "nothing in a member": (members_of(items=b""), "items.npy is no array"),
    "an array cut short": (members_of(items=npy(np.arange(3, dtype="<i4"))[:-2]), "has 3 values, but holds 10 bytes"),
    "too many items": (members_of(items=[5, 6, 7, 8]), "do not add up"),
    "too few items": (members_of(items=[5, 6]), "do not add up"),
    "a negative length": (members_of(lengths=[4, -1]), "do not add up"),
    "a user without items": (members_of(lengths=[3, 0]), "do not add up"),
    "fewer lengths than users": (members_of(lengths=[3]), "users are not"),
    "users out of order": (members_of(users=[11, 10]), "users are not"),
    "another shard's users": (members_of(users=[20, 21]), "users are not"),
    "a row beyond M": (members_of(items=[5, ROWS, 7]), "outside the 100 rows"),
    "a negative row": (members_of(items=[5, -1, 7]), "outside the 100 rows"),
    "too few users": (members_of(users=[10], lengths=[3]), "users are not the 2 from 10 on"),
}


@pytest.mark.parametrize(("members", "named"), BAD.values(), ids=BAD)
def test_a_shard_that_cannot_be_used_is_named_even_where_its_checksum_is_not_asked_for(tmp_path, members, named):
    path = tmp_path / "000000.tar"
    write_tar(path, members)
    with pytest.raises(InputError) as error:
        read(path, 2)
    assert "000000.tar" in str(error.value) and named in str(error.value)


def test_the_table_of_bad_shards_starts_from_a_good_one(tmp_path):
    path = tmp_path / "000000.tar"
    write_tar(path, members_of())
    for verify in (True, False):
        assert len(read(path, 2, verify, sha256=hashlib.sha256(path.read_bytes()).hexdigest())) == 1


@pytest.mark.parametrize("drop", [["crc32"], []])
def test_a_blocks_own_checksum_is_asked_for_with_the_shards(tmp_path, drop):
    """The shard is as dataset.json says, but was written with a block that is not as its checksum says."""
    path, members = tmp_path / "000000.tar", members_of(drop=drop)
    members["000000-000000.items.npy"] = npy(np.array([5, 6, 8], "<i4"))
    write_tar(path, members)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"000000\.tar: block 0: .*" + ("crc32.npy is missing" if drop else "CRC-32")):
        read(path, 2, verify=True, sha256=sha256)
    assert read(path, 2, verify=False)[0].items_N.tolist() == [5, 6, 8]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"x" * 2000), Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_no_tar_is_named(tmp_path, spoil, verify):
    path = tmp_path / "000000.tar"
    _, sha256 = write_shard(path, [block(10, [4, 4])])
    spoil(path)
    with pytest.raises(InputError, match=r"000000\.tar"):
        read(path, 2, verify=verify, sha256=sha256)
