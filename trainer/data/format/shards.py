"""Shards: WebDataset tars in which one sample is a block of users in jagged arrays.

Members of a sample, of B users with N interactions:

    lengths.npy      uint8, 16 or 32, whichever is the narrowest for the block: (B,)
    items.low.npy    uint16 (N,): the rows of M modulo 2¹⁶, each user's history oldest first
    items.high.zst   the rows divided by 2¹⁶, as N bytes (N little-endian uint16 where M has
                     more than 2²⁴ rows), Zstandard
    ticks.zst        the tick of each interaction (see `Dataset.ticks`), less the tick of the
                     one before it in the block, modulo 2¹⁶: N little-endian uint16, Zstandard
    crc32.npy        uint32 (1,): CRC-32 of the number of the block's first user (int64,
                     little-endian) and of the contents of the other members, one after the
                     other: it tells a damaged block from a whole one

A block of four users, where domain 0 owns the rows 0 … 4 of M and domain 1 the rows 5 … 8:

    user           0             1     2          3
    history        [2 5 0 6]     [7]   [1 1 3]    [5 8]
    ticks          [0 9 9 40]    [12]  [3 20 90]  [7 8]

    lengths.npy    4 1 3 2
    items.low.npy  2 5 0 6 | 7 | 1 1 3 | 5 8
    items.high     0 0 0 0 | 0 | 0 0 0 | 0 0
    ticks          0 9 0 31 | 65508 | 65527 17 70 | 65453 1

Rows are numbered by popularity within a domain. So the high part is small and compresses well,
and the low part hardly does.

Block k of a shard, `<shard>-<k>` in the tar, holds its users [k · block_users, (k + 1) ·
block_users). A block's users follow from its number and from `dataset.json`, never from its
contents.

Tars are written and read by `tarfile`, as WebDataset does it itself: importing WebDataset takes
seconds in each process that prepares, since it takes torch along.
"""

import hashlib
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from trainer.data.format.dataset import Dataset, Shard
from trainer.data.remote.source import FetchFailed
from trainer.errors import InputError
from trainer.files.open_files import (
    ERRORS_OF_FILE,
    TooManyOpenFiles,
    explain_unreadable,
)
from trainer.files.redact import printable_text

if TYPE_CHECKING:
    import pyarrow as pa

_LENGTHS = "lengths.npy"
_LOW = "items.low.npy"
_HIGH = "items.high.zst"
_TICKS = "ticks.zst"
_CHECKSUM = "crc32.npy"
_CONTENTS = (_LENGTHS, _LOW, _HIGH, _TICKS)
_LENGTH_DTYPES = (np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4"))
_LOW_DTYPE = np.dtype("<u2")
_TICKS_DTYPE = np.dtype("<u2")
_CHECKSUM_DTYPE = np.dtype("<u4")
_ZERO = np.zeros(1, _TICKS_DTYPE)


@dataclass(frozen=True)
class Block:
    """Histories of B users one after the other, N interactions together.

    lengths_B: int32 (B,), whose sum is N. items_N: rows of M, int32 (N,), each user's oldest
    first.
    ticks_N: uint16 (N,).

        Two domains (rows 0 … 4 and 5 … 8 of M), four users:

        lengths_B   4          1    3         2
        items_N     2 5 0  6 | 7  | 1  1  3 | 5 8
        ticks_N     0 9 9 40 | 12 | 3 20 90 | 7 8
    """

    lengths_B: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


class _Member(NamedTuple):
    """A file in the tar: its name without the sample's key, and where its content lies."""

    name: str
    offset: int
    size: int


def zstd_codec(level: int | None = None) -> "pa.Codec":
    """Returns the Zstandard codec that packs, at a level, and unpacks a block's members.

    pyarrow is loaded at the first call: settings are imported with this module.
    """
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=level)


def write_shard(
    path: Path,
    first_user: int,
    num_embeddings: int,
    blocks: Iterable[Block],
) -> tuple[int, str]:
    """Writes the blocks of the users from `first_user` on as one tar.

    num_embeddings: rows of M. Equal blocks give equal bytes.
    Returns the tar's size in bytes and its sha256.
    """
    path = Path(path)
    zstd = zstd_codec(level=1)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            members = _encode_block(block, first_user, num_embeddings, zstd)
            key = f"{path.stem}-{number:06d}"
            for name in sorted(members):
                content = members[name]
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            first_user += len(block.lengths_B)
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return path.stat().st_size, sha256


def _encode_block(
    block: Block,
    first_user: int,
    num_embeddings: int,
    zstd: "pa.Codec",
) -> dict[str, bytes]:
    """Returns the contents of a block's members by name, as the module's head draws them."""
    rows = np.ascontiguousarray(block.items_N, np.dtype("<u4"))
    low = rows.astype(_LOW_DTYPE)  # modulo 2¹⁶
    high_dtype = _high_dtype(num_embeddings)
    high = (rows >> np.uint32(16)).astype(high_dtype)
    ticks = block.ticks_N.astype(_TICKS_DTYPE)
    tick_steps = np.diff(ticks, prepend=_ZERO)
    longest = block.lengths_B.max()
    length_dtype = _narrowest_dtype(longest)
    lengths = block.lengths_B.astype(length_dtype)
    contents = {
        _LENGTHS: _to_npy(lengths),
        _LOW: _to_npy(low),
        _HIGH: zstd.compress(high.tobytes(), asbytes=True),
        _TICKS: zstd.compress(tick_steps.tobytes(), asbytes=True),
    }
    checksum = _compute_crc32(first_user, contents.values())
    checksums = np.array([checksum], _CHECKSUM_DTYPE)
    contents[_CHECKSUM] = _to_npy(checksums)
    return contents


class ShardFile:
    """An open shard, whose blocks are read in any order.

    It holds the blocks 0 … `count` − 1, of the dataset's `block_users` users each from
    `first_user` on, the last one with the rest.
    """

    def __init__(
        self,
        dataset: Dataset,
        shard: Shard,
        verify: bool = True,
        report: Callable[[str], None] | None = None,
        whole: bool = True,
    ):
        """Opens the shard and finds its blocks, from the tar's headers alone.

        verify: compare each block with its CRC-32 when it is read. whole: and compare the
        file's sha256 with `dataset.json` at once.

        report: None refuses a damaged shard. Otherwise blocks that cannot be used are left out,
        and `report` gets a line for each: a damaged block alone, the rest of the shard where
        the tar itself breaks off, all of a file that cannot be read.
        Raises InputError, naming the file: it is missing or unreadable, a checksum is wrong, a
        member is missing, of another dtype or no array, lengths do not add up, a row is out of
        range. With any `report` it is raised where the file is not at fault: TooManyOpenFiles for
        too many open files.
        """
        self.dataset = dataset
        self.shard = shard
        self.verify = verify
        self.first_user = shard.first_user
        self.count = -(-shard.users // dataset.block_users)
        self._report = report
        self._members: dict[int, list[_Member]] = {}  # by number of the block
        self._next_block = 0  # while they are indexed: the next block to come
        self._stream: io.BufferedReader | None = None
        self._compared = False
        try:
            self.path = dataset.local(shard.name)
        except FetchFailed as error:
            if report is None:
                raise
            skipped = _skipped_users(dataset, shard, 0, self.count)
            report(f"{error.problem}: {skipped}")
            return
        self._open(whole)

    def _open(self, whole: bool) -> None:
        """Opens the file, and indexes its blocks."""
        try:
            with _file_errors(self.path):
                if not self.path.is_file():  # a pipe would be waited for
                    raise _Damage("it is missing or no file")
                self._stream = open(self.path, "rb")  # noqa: SIM115 (until `close`)
                if whole:
                    self.compare()
                self._index_blocks(self._stream)
        except _Damage as error:
            if self._report is None:
                self.close()
            self._refuse(self._next_block, self.count, error)
        except InputError:
            self.close()
            raise

    def _index_blocks(self, stream: BinaryIO) -> None:
        """Notes where the members of each block lie. Blocks have to come in order."""
        for key, members in _read_samples(stream):
            expected = self._next_block
            number = _parse_block_number(key, self.path)
            if number is None or not expected <= number < self.count:
                problem = f"{key!r} is none of its {self.count} blocks, or out of turn"
                self._refuse(expected, expected, problem)
                continue
            if number > expected:
                blocks = _name_blocks(expected, number)
                self._refuse(expected, number, f"{blocks} missing")
            self._members[number] = members
            self._next_block = number + 1
        if self._next_block < self.count:
            blocks = _name_blocks(self._next_block, self.count)
            raise _Damage(f"{blocks} missing")

    def compare(self) -> None:
        """Compares the file's sha256 with `dataset.json`, once, if checksums are verified."""
        if self._compared or self._stream is None or not self.verify:
            return
        if self.dataset.cache:  # which has compared it
            return
        with _file_errors(self.path):
            self._stream.seek(0)
            digest = hashlib.file_digest(self._stream, "sha256").hexdigest()
        self._compared = True
        if digest == self.shard.sha256:
            return
        problem = "its sha256 is not the one in dataset.json"
        if self._report is None:
            self._refuse(0, self.count, problem)
        else:
            self._report(
                f"{self.path}: {problem}: its blocks are checked one by one"
            )

    def block(self, number: int) -> Block | None:
        """Reads a block; returns None for one that cannot be used and has been reported."""
        if number not in self._members:
            return None
        block_users = self.dataset.block_users
        users_before = number * block_users
        first_user = self.first_user + users_before
        users = min(block_users, self.shard.users - users_before)
        try:
            return self._read_block(self._members[number], first_user, users)
        except _Damage as error:
            del self._members[number]  # reported once
            problem = f"block {number}: {error}"
            self._refuse(number, number + 1, problem)
            return None

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _refuse(
        self,
        begin: int,
        end: int,
        problem: object,
    ) -> None:
        """Reports or raises that blocks begin … end − 1 cannot be used."""
        if self._report is None:
            raise InputError(
                f"{self.path}: {problem}: "
                "copy the file again or prepare the dataset again"
            )
        skipped = _skipped_users(self.dataset, self.shard, begin, end)
        self._report(f"{self.path}: {problem}: {skipped}")

    def _read_block(
        self,
        members: list[_Member],
        first_user: int,
        users: int,
    ) -> Block:
        """Reads and checks one block.

        members: of its sample. users: how many it has to hold, from `first_user` on. The rows
        and the ticks are put together as the module's head draws them.
        """
        num_embeddings = self.dataset.num_embeddings
        contents = {}
        for name in _CONTENTS:
            contents[name] = self._read_member(members, name)
        if self.verify:
            content = self._read_member(members, _CHECKSUM)
            stored = _from_npy(content, (_CHECKSUM_DTYPE,), _CHECKSUM)
            stored_checksums = stored.tolist()
            computed = _compute_crc32(first_user, contents.values())
            if stored_checksums != [computed]:
                raise _Damage("its checksum (CRC-32) is wrong")
        lengths = _from_npy(contents[_LENGTHS], _LENGTH_DTYPES, _LENGTHS)
        low = _from_npy(contents[_LOW], (_LOW_DTYPE,), _LOW)
        total = lengths.sum(dtype=np.int64)
        if len(lengths) != users or not lengths.all() or total != len(low):
            raise _Damage(
                f"lengths are not those of {users} users with {len(low)} items together"
            )
        high_dtype = _high_dtype(num_embeddings)
        high = _unpack(contents, _HIGH, high_dtype, len(low))
        rows = high.astype("<i4")
        rows <<= 16
        rows |= low
        if len(rows) and not 0 <= rows.min() <= rows.max() < num_embeddings:
            raise _Damage(
                f"an item is outside the {num_embeddings} rows of the item matrix"
            )
        tick_steps = _unpack(contents, _TICKS, _TICKS_DTYPE, len(low))
        ticks = np.cumsum(tick_steps, dtype=np.uint16)  # modulo 2¹⁶
        return Block(
            lengths_B=lengths.astype(np.int32),
            items_N=rows,
            ticks_N=ticks,
        )

    def _read_member(self, members: list[_Member], name: str) -> bytes:
        """Reads the content of the one member with a name."""
        matches = [member for member in members if member.name == name]
        if not matches:
            raise _Damage(f"the member {name} is missing")
        if len(matches) > 1:
            raise _Damage(f"the member {name} is there twice")
        (member,) = matches
        if self._stream is None:
            raise ValueError(f"{self.path} is closed")
        with _file_errors(self.path):
            descriptor = self._stream.fileno()
            content = os.pread(descriptor, member.size, member.offset)
        if len(content) != member.size:
            raise _Damage(f"{name} is cut short")
        return content


def read_blocks(
    dataset: Dataset,
    shard: Shard,
    verify: bool = True,
    report: Callable[[str], None] | None = None,
    whole: bool = True,
) -> Iterator[tuple[int, Block]]:
    """Yields (first user, Block) of a shard in order; see `ShardFile` for the arguments."""
    file = ShardFile(dataset, shard, verify, report, whole=whole)
    try:
        for number in range(file.count):
            block = file.block(number)
            if block is not None:
                users_before = number * dataset.block_users
                yield shard.first_user + users_before, block
    finally:
        file.close()


class _Damage(Exception):
    """What is wrong with a file or a block, in words that go on from its name."""


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into damage where the file is at fault, else into an InputError.

    Skipping would lose sound users.
    """
    try:
        yield
    except OSError as error:
        if error.errno in ERRORS_OF_FILE:
            reason = printable_text(error)
            raise _Damage(f"it cannot be read ({reason})") from None
        refusal = explain_unreadable(path, error, "")
        if not isinstance(refusal, TooManyOpenFiles):
            refusal = InputError(
                f"{refusal}; a file that is lost for good is skipped once it is removed "
                "(stream.damaged=skip)"
            )
        refusal.one_rank = True
        raise refusal from None


def _skipped_users(
    dataset: Dataset,
    shard: Shard,
    begin: int,
    end: int,
) -> str:
    """Says which users are skipped with the blocks begin … end − 1.

    Of a shard of 5 users from 10 on, in blocks of 2 users:

        begin    end    returns
        0        2      users 10 to 13 are skipped
        2        3      user 14 is skipped
        1        1      no user is skipped for it
    """
    end_user = min(end * dataset.block_users, shard.users)
    first = shard.first_user + begin * dataset.block_users
    last = shard.first_user + end_user - 1
    if first < last:
        return f"users {first} to {last} are skipped"
    if first == last:
        return f"user {first} is skipped"
    return "no user is skipped for it"


def _name_blocks(begin: int, end: int) -> str:
    if end - begin == 1:
        return f"block {begin} is"
    return f"blocks {begin} to {end - 1} are"


def _read_samples(stream: BinaryIO) -> Iterator[tuple[str, list[_Member]]]:
    """Yields (key, members) of each run of members with one key. Headers alone are read.

    Of "a-0.items.low.npy" the key is "a-0" and the name "items.low.npy".

    WebDataset's own reader is not used: it unpacks whatever compression and sparse members a
    file holds, by which few bytes become any number. It also lets tarfile follow sizes below 0
    in a circle.
    """
    try:
        file_size = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            headers = iter(tar.next, None)
            for key, group in itertools.groupby(headers, _sample_key):
                members = []
                for header in group:
                    room = file_size - header.offset_data
                    fits = 0 <= header.size <= room
                    if header.issparse() or not fits:
                        raise tarfile.ReadError(
                            f"{header.name!r} is sparse "
                            "or reaches beyond the end of the file"
                        )
                    if header.isreg():
                        _, _, name = header.name.partition(".")
                        member = _Member(name, header.offset_data, header.size)
                        members.append(member)
                if key and members:
                    yield key, members
    except OSError:  # of the system, not of what it reads
        raise
    except Exception as error:
        # Of a damaged archive tarfile raises whatever its parsing stumbles over.
        reason = printable_text(error)
        raise _Damage(f"it cannot be read ({reason})") from None


def _sample_key(header: tarfile.TarInfo) -> str:
    """Returns "000001-000002" of "000001-000002.items.low.npy": a key has no dot."""
    key, _, _ = header.name.partition(".")
    return key


def _parse_block_number(key: str, path: Path) -> int | None:
    """Returns the number of a block by its key; None for a key that is none of this shard's.

    Of shards/000001.tar:

        000001-000002    2
        000003-000002    None
        readme           None
    """
    match = re.fullmatch(r"(.+)-(\d{6,12})", key, re.ASCII)
    if match is None or match[1] != path.stem:
        return None
    return int(match[2])


def _to_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _from_npy(
    data: bytes,
    dtypes: tuple[np.dtype, ...],
    member: str,
) -> np.ndarray:
    """Parses the array of a member, which has to be of one axis and of one of the dtypes.

    Nothing is made before its size is known, and never an object.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = readers[version](stream)
    except Exception as error:
        # A header is Python's own text for a dict: parsing it may fail in many ways.
        reason = printable_text(error)
        raise _Damage(
            f"{member} is no array that can be read ({reason})"
        ) from None
    axes = len(shape)
    if dtype not in dtypes or axes != 1:
        names = [str(allowed) for allowed in dtypes]
        expected = " or ".join(names)
        stored = printable_text(dtype)
        raise _Damage(
            f"{member} is {stored} with {axes} axes, not {expected} with one"
        )
    (count,) = shape
    begin = stream.tell()
    left = len(data) - begin
    if left != count * dtype.itemsize:
        raise _Damage(
            f"{member} says that it has {count} values, but holds {left} bytes"
        )
    return np.frombuffer(data, dtype, offset=begin)


def _narrowest_dtype(longest: int) -> np.dtype:
    """Returns the narrowest dtype of lengths that holds the longest.

    longest    255      256       65,536
    dtype      uint8    uint16    uint32
    """
    for dtype in _LENGTH_DTYPES:
        if longest <= np.iinfo(dtype).max:
            return dtype
    raise AssertionError(f"a length of {longest} does not fit uint32")


def _high_dtype(num_embeddings: int) -> np.dtype:
    """Returns the dtype of the rows divided by 2¹⁶."""
    if num_embeddings <= 2**24:
        return np.dtype("u1")
    return np.dtype("<u2")


def _unpack(
    contents: dict[str, bytes],
    name: str,
    dtype: np.dtype,
    count: int,
) -> np.ndarray:
    """Decompresses `count` values of a member. The frame gets no more room than they take."""
    size = count * dtype.itemsize
    try:
        codec = zstd_codec()
        unpacked = codec.decompress(contents[name], size)
    except Exception as error:
        reason = printable_text(error)
        raise _Damage(f"{name} cannot be unpacked ({reason})") from None
    if len(unpacked) != size:
        raise _Damage(f"{name} holds {len(unpacked)} bytes, not {size}")
    return np.frombuffer(unpacked, dtype)


def _compute_crc32(first_user: int, contents: Iterable[bytes]) -> int:
    """Computes the checksum of a block's first user and its members."""
    first_bytes = first_user.to_bytes(8, "little")
    value = zlib.crc32(first_bytes)
    for content in contents:
        value = zlib.crc32(content, value)
    return value
