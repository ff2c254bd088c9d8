"""Shards: WebDataset tars in which one sample is a block of users in jagged arrays.

Members of a sample: `users.npy` (int64, (B,)), `lengths.npy` (int32, (B,)), `items.npy` (int32, (N,), N = sum of the
lengths), where `items` are rows of M, each user's history oldest first, and `crc32.npy` (uint32, (1,)): the CRC-32 of the
little-endian bytes of users, lengths and items, one after the other, which tells a damaged block from a whole one.

Block k of a shard, `<shard>-<k>` in the tar, holds its users [k · block_users, (k + 1) · block_users): who is in a block
follows from its place and the dataset's facts, never from what it holds.
"""

import hashlib
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from trainer.data.dataset import Dataset, Shard
from trainer.errors import InputError

_DTYPES = {"users": np.dtype("<i8"), "lengths": np.dtype("<i4"), "items": np.dtype("<i4")}
_CHECKSUM, _CHECKSUM_DTYPE = "crc32", np.dtype("<u4")


@dataclass(frozen=True)
class Block:
    """Histories of B users: numbers int64 (B,), lengths int32 (B,), rows of M int32 (N,)."""

    users_B: np.ndarray
    lengths_B: np.ndarray
    items_N: np.ndarray


def write_shard(path: Path, blocks: Iterable[Block]) -> tuple[int, str]:
    """Writes blocks as one tar and returns its size in bytes and its sha256. Equal blocks give equal bytes."""
    path = Path(path)
    with (
        open(path, "wb") as stream,
        TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False) as tar,
    ):
        for number, block in enumerate(blocks):
            given = zip(_DTYPES.items(), (block.users_B, block.lengths_B, block.items_N), strict=True)
            arrays = {name: np.ascontiguousarray(array, dtype) for (name, dtype), array in given}
            arrays[_CHECKSUM] = np.array([_crc32(arrays.values())], _CHECKSUM_DTYPE)
            members = {f"{name}.npy": _to_npy(array) for name, array in arrays.items()}
            tar.write({"__key__": f"{path.stem}-{number:06d}", **members})
    return path.stat().st_size, _sha256(path)


def read_blocks(
    dataset: Dataset, shard: Shard, verify: bool = True, report: Callable[[str], None] | None = None
) -> Iterator[Block]:
    """Yields the blocks of a shard in order.

    verify: compare the file's sha256 with `dataset.json` before the first block, and each block with its CRC-32.
    report: None refuses a damaged shard. Otherwise blocks that cannot be used are left out, and `report` gets a line for
    each: a damaged block alone, the rest of the shard where the tar itself breaks off, all of a file that cannot be read.
    Raises InputError, naming the file: it is missing or unreadable, a checksum is wrong, a member is missing, of another
    dtype or no array, lengths do not add up, a user or a row is out of range.
    """
    path = dataset.folder / shard.name
    count = -(-shard.users // dataset.block_users)
    place = 0  # the next block to come

    def refuse(begin, end, what):
        """Blocks begin … end − 1 cannot be used."""
        if report is None:
            raise InputError(f"{path}: {what}: copy the file again or prepare the dataset again")
        report(f"{path}: {what}: {_left_out(dataset, shard, begin, end)}")

    try:
        if not path.is_file():  # a pipe would be waited for
            raise _Damage("it is missing or no file")
        if verify and _digest(path) != shard.sha256:
            if report is None:
                raise _Damage("its sha256 is not the one in dataset.json")
            report(f"{path}: its sha256 is not the one in dataset.json: its blocks are checked one by one")
        for key, members in _samples(path):
            number = _number(key, path)
            if number is None or not place <= number < count:
                refuse(place, place, f"{key!r} is none of its {count} blocks, or out of turn")
                continue
            if number > place:
                refuse(place, number, f"{_blocks(place, number)} missing")
            place = number + 1
            try:
                block = _to_block(key, members, verify)
                _check(block, range(shard.users)[number * dataset.block_users :][: dataset.block_users], shard, dataset)
            except _Damage as error:
                refuse(number, place, f"block {number}: {error}")
                continue
            yield block
    except _Damage as error:
        refuse(place, count, error)
        return
    if place < count:
        refuse(place, count, f"{_blocks(place, count)} missing")


class _Damage(Exception):
    """What is wrong with a file or a block, in words that go on from its name."""


def _left_out(dataset, shard, begin, end):
    first = shard.first_user + begin * dataset.block_users
    last = shard.first_user + min(end * dataset.block_users, shard.users) - 1
    if first >= last:
        return f"user {first} is skipped" if first == last else "no user is skipped for it"
    return f"users {first} to {last} are skipped"


def _blocks(begin, end):
    return f"block {begin} is" if end - begin == 1 else f"blocks {begin} to {end - 1} are"


def _samples(path):
    """(key, [(name, content), …]) of each run of members with one key; of "a-0.items.npy" key "a-0", name "items.npy".

    Not WebDataset's own reader: that one unpacks whatever compression and sparse members a file holds, by which few bytes
    become any number, and lets tarfile follow sizes below 0 in a circle.
    """
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for key, members in itertools.groupby(iter(tar.next, None), lambda member: base_plus_ext(member.name)[0]):
                contents = []
                for member in members:
                    if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"{member.name!r} is sparse or reaches beyond the end of the file")
                    if member.isreg():
                        contents.append((base_plus_ext(member.name)[1], tar.extractfile(member).read()))
                if key is not None and contents:
                    yield key, contents
    except Exception as error:  # of a damaged archive tarfile raises whatever its parsing stumbles over
        raise _Damage(f"it cannot be read ({_words(error)})") from None


def _number(key, path):
    found = re.fullmatch(r"(.+)-(\d{6,12})", key, re.ASCII)
    return int(found[2]) if found and found[1] == path.stem else None


def _to_npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _from_npy(data, dtype, member):
    """The array of a member, which has to be of one axis. Nothing is made before its size is known, and never an object."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, found = read_header(stream)
    except Exception as error:  # a header is Python's own text for a dict: parsing it may fail in many ways
        raise _Damage(f"{member} is no array that can be read ({_words(error)})") from None
    if found != dtype or len(shape) != 1:
        raise _Damage(f"{member} is {_words(found)} with {len(shape)} axes, not {dtype} with one")
    held = len(data) - stream.tell()
    if held != shape[0] * dtype.itemsize:
        raise _Damage(f"{member} says that it has {shape[0]} values, but holds {held} bytes")
    return np.frombuffer(data, dtype, offset=stream.tell())


def _to_block(key, members, verify):
    def array(name, dtype):
        contents = [content for found, content in members if found == f"{name}.npy"]
        if len(contents) != 1:
            raise _Damage(f"the member {key}.{name}.npy is {'there twice' if contents else 'missing'}")
        return _from_npy(contents[0], dtype, f"{key}.{name}.npy")

    arrays = [array(name, dtype) for name, dtype in _DTYPES.items()]
    if verify and array(_CHECKSUM, _CHECKSUM_DTYPE).tolist() != [_crc32(arrays)]:
        raise _Damage("its checksum (CRC-32) is wrong")
    return Block(*arrays)


def _check(block, places, shard, dataset):
    """places: those of the block's users in the shard, a range."""
    users, lengths, items = block.users_B, block.lengths_B, block.items_N
    expected = np.arange(shard.first_user + places.start, shard.first_user + places.stop)
    if not np.array_equal(users, expected) or len(lengths) != len(expected):
        raise _Damage(f"users are not the {len(expected)} from {expected[0]} on")
    if (lengths < 1).any() or lengths.sum(dtype=np.int64) != len(items):
        raise _Damage(f"lengths do not add up to the {len(items)} items")
    if len(items) and not 0 <= items.min() <= items.max() < dataset.num_embeddings:
        raise _Damage(f"an item is outside the {dataset.num_embeddings} rows of the item matrix")


def _crc32(arrays):
    value = 0
    for array in arrays:
        value = zlib.crc32(array, value)
    return value


def _digest(path):
    try:
        return _sha256(path)
    except OSError as error:
        raise _Damage(f"it cannot be read ({_words(error)})") from None


def _words(said):
    """What an exception or a file says: short, on one line, with nothing in it that steers a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(said))
    return " ".join(text.split())[:200] or type(said).__name__


def _sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
