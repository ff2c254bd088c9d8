"""Shards: WebDataset tars in which one sample is a block of users in jagged arrays.

Members of a sample, of B users with N interactions:

    lengths.npy      uint8, 16 or 32, whichever is the narrowest for the block: (B,)
    items.low.npy    uint16 (N,): the rows of M modulo 2¹⁶, each user's history oldest first
    items.high.zst   the rows divided by 2¹⁶, as N bytes (N little-endian uint16 where M has more than 2²⁴ rows), Zstandard
    ticks.zst        when each interaction was (see `Dataset.ticks`), less when the one before it in the block was, modulo 2¹⁶:
                     N little-endian uint16, Zstandard
    crc32.npy        uint32 (1,): CRC-32 of the number of the block's first user (int64, little-endian) and of the contents of
                     the other members, one after the other: it tells a damaged block from a whole one

Rows are numbered by popularity within a domain, so the high part is small and compresses well, and the low part hardly does.

Block k of a shard, `<shard>-<k>` in the tar, holds its users [k · block_users, (k + 1) · block_users): who is in a block
follows from its place and the dataset's facts, never from what it holds.

Tars are written and read by `tarfile`, as WebDataset does it itself: importing WebDataset takes seconds in each process that
prepares, since it takes torch along.
"""

import errno
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

import numpy as np

from trainer.data.format.dataset import Dataset, Shard
from trainer.data.remote.source import NotFetched
from trainer.errors import InputError
from trainer.files.open_files import NoDescriptors, is_lack
from trainer.files.redact import words

_LENGTHS, _LOW, _HIGH, _TICKS, _CHECKSUM = (
    "lengths.npy",
    "items.low.npy",
    "items.high.zst",
    "ticks.zst",
    "crc32.npy",
)
_CONTENTS = (_LENGTHS, _LOW, _HIGH, _TICKS)
_LENGTH_DTYPES = tuple(map(np.dtype, ("u1", "<u2", "<u4")))
_LOW_DTYPE, _TICKS_DTYPE, _CHECKSUM_DTYPE = (
    np.dtype("<u2"),
    np.dtype("<u2"),
    np.dtype("<u4"),
)
_ZERO = np.zeros(1, _TICKS_DTYPE)
# What the system says where the file itself is at fault. Anything else (a mount that is away, no memory) may pass.
_OF_THE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
}


@dataclass(frozen=True)
class Block:
    """Histories of B users one after the other: lengths int32 (B,); rows of M int32 (N,) and ticks uint16 (N,), N the sum of
    the lengths."""

    lengths_B: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


def codec(level: int | None = None):
    """What packs a block's members, at a level of its own, and unpacks them.

    Loaded when it is first asked for: settings are imported with this module.
    """
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=level)


def write_shard(
    path: Path, first_user: int, num_embeddings: int, blocks: Iterable[Block]
) -> tuple[int, str]:
    """Writes the blocks of the users from `first_user` on as one tar, and returns its size in bytes and its sha256.

    num_embeddings: rows of M. Equal blocks give equal bytes.
    """
    path = Path(path)
    zstd = codec(level=1)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            rows = np.ascontiguousarray(block.items_N, np.dtype("<u4"))
            longest = block.lengths_B.max()
            narrow = next(
                dtype for dtype in _LENGTH_DTYPES if longest <= np.iinfo(dtype).max
            )
            high = (rows >> np.uint32(16)).astype(_high_dtype(num_embeddings))
            contents = {
                _LENGTHS: _to_npy(block.lengths_B.astype(narrow)),
                _LOW: _to_npy(rows.astype(_LOW_DTYPE)),  # modulo 2¹⁶
                _HIGH: zstd.compress(high.tobytes(), asbytes=True),
                _TICKS: zstd.compress(
                    np.diff(
                        block.ticks_N.astype(_TICKS_DTYPE), prepend=_ZERO
                    ).tobytes(),
                    asbytes=True,
                ),
            }
            checksum = np.array(
                [_crc32(first_user, contents.values())], _CHECKSUM_DTYPE
            )
            for name, content in sorted(
                {**contents, _CHECKSUM: _to_npy(checksum)}.items()
            ):
                member = tarfile.TarInfo(f"{path.stem}-{number:06d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            first_user += len(block.lengths_B)
    return path.stat().st_size, _sha256(path)


class ShardFile:
    """An open shard, whose blocks are read in any order.

    `first_user` and `count` say what it holds: blocks 0 … count − 1, of the dataset's `block_users` users each from
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
        """verify: compare each block with its CRC-32 when it is read; whole: and now the file's sha256 with `dataset.json`.

        report: None refuses a damaged shard. Otherwise blocks that cannot be used are left out, and `report` gets a line for
        each: a damaged block alone, the rest of the shard where the tar itself breaks off, all of a file that cannot be read.
        Raises InputError, naming the file: it is missing or unreadable, a checksum is wrong, a member is missing, of another
        dtype or no array, lengths do not add up, a row is out of range; whatever `report` is where the file is not at fault,
        NoDescriptors where it is too many open files.
        """
        self.dataset, self.shard, self.verify, self._report = (
            dataset,
            shard,
            verify,
            report,
        )
        self.first_user, self.count = (
            shard.first_user,
            -(-shard.users // dataset.block_users),
        )
        self._members, self._stream, self._compared = {}, None, False
        try:
            self.path = dataset.local(shard.name)
        except NotFetched as error:
            if report is None:
                raise
            report(f"{error.said}: {_left_out(dataset, shard, 0, self.count)}")
            return
        place = 0  # the next block to come
        try:
            with _told_apart(self.path):
                if not self.path.is_file():  # a pipe would be waited for
                    raise _Damage("it is missing or no file")
                self._stream = open(self.path, "rb")  # noqa: SIM115 (until `close`)
                if whole:
                    self.compare()
                for key, members in _samples(self._stream):
                    number = _number(key, self.path)
                    if number is None or not place <= number < self.count:
                        self._refuse(
                            place,
                            place,
                            f"{key!r} is none of its {self.count} blocks, or out of turn",
                        )
                        continue
                    if number > place:
                        self._refuse(place, number, f"{_blocks(place, number)} missing")
                    self._members[number] = members
                    place = number + 1
                if place < self.count:
                    raise _Damage(f"{_blocks(place, self.count)} missing")
        except _Damage as error:
            if report is None:
                self.close()
            self._refuse(place, self.count, error)
        except InputError:
            self.close()
            raise

    def compare(self) -> None:
        """Compares the file's sha256 with `dataset.json`, once, where checksums are asked for."""
        if (
            self._compared
            or self._stream is None
            or not self.verify
            or self.dataset.cache
        ):  # the cache has compared it
            return
        with _told_apart(self.path):
            self._stream.seek(0)
            digest = hashlib.file_digest(self._stream, "sha256").hexdigest()
        self._compared = True
        if digest == self.shard.sha256:
            return
        if self._report is None:
            self._refuse(0, self.count, "its sha256 is not the one in dataset.json")
        self._report(
            f"{self.path}: its sha256 is not the one in dataset.json: its blocks are checked one by one"
        )

    def block(self, number: int) -> Block | None:
        """Block `number`; None where it cannot be used and that has been reported."""
        if number not in self._members:
            return None
        users = min(
            self.dataset.block_users,
            self.shard.users - number * self.dataset.block_users,
        )
        first_user = self.first_user + number * self.dataset.block_users
        try:
            return self._read(self._members[number], first_user, users)
        except _Damage as error:
            del self._members[number]  # said once
            self._refuse(number, number + 1, f"block {number}: {error}")
            return None

    def close(self):
        """Lets the file go."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _refuse(self, begin, end, what):
        """Blocks begin … end − 1 cannot be used."""
        if self._report is None:
            raise InputError(
                f"{self.path}: {what}: copy the file again or prepare the dataset again"
            )
        self._report(
            f"{self.path}: {what}: {_left_out(self.dataset, self.shard, begin, end)}"
        )

    def _read(self, members, first_user, users):
        contents = {name: self._content(members, name) for name in _CONTENTS}
        if self.verify:
            stored = _from_npy(
                self._content(members, _CHECKSUM), (_CHECKSUM_DTYPE,), _CHECKSUM
            )
            if stored.tolist() != [_crc32(first_user, contents.values())]:
                raise _Damage("its checksum (CRC-32) is wrong")
        lengths = _from_npy(contents[_LENGTHS], _LENGTH_DTYPES, _LENGTHS)
        low = _from_npy(contents[_LOW], (_LOW_DTYPE,), _LOW)
        if (
            len(lengths) != users
            or not lengths.all()
            or lengths.sum(dtype=np.int64) != len(low)
        ):
            raise _Damage(
                f"lengths are not those of {users} users with {len(low)} items together"
            )
        high = _unpacked(
            contents, _HIGH, _high_dtype(self.dataset.num_embeddings), len(low)
        )
        rows = high.astype("<i4")
        rows <<= 16
        rows |= low
        if (
            len(rows)
            and not 0 <= rows.min() <= rows.max() < self.dataset.num_embeddings
        ):
            raise _Damage(
                f"an item is outside the {self.dataset.num_embeddings} rows of the item matrix"
            )
        ticks = np.cumsum(
            _unpacked(contents, _TICKS, _TICKS_DTYPE, len(low)), dtype=np.uint16
        )  # modulo 2¹⁶
        return Block(lengths.astype(np.int32), rows, ticks)

    def _content(self, members, name):
        found = [place for member, *place in members if member == name]
        if len(found) != 1:
            raise _Damage(
                f"the member {name} is {'there twice' if found else 'missing'}"
            )
        ((offset, size),) = found
        with _told_apart(self.path):
            content = os.pread(self._stream.fileno(), size, offset)
        if len(content) != size:
            raise _Damage(f"{name} is cut short")
        return content


def read_blocks(
    dataset: Dataset,
    shard: Shard,
    verify: bool = True,
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Block]]:
    """Yields (first user, Block) of a shard in order; arguments and errors as for `ShardFile`."""
    file = ShardFile(dataset, shard, verify, report)
    try:
        for number in range(file.count):
            block = file.block(number)
            if block is not None:
                yield shard.first_user + number * dataset.block_users, block
    finally:
        file.close()


class _Damage(Exception):
    """What is wrong with a file or a block, in words that go on from its name."""


@contextmanager
def _told_apart(path):
    """Turns an OSError into damage where the file is at fault, else into an InputError: skipping would lose sound users."""
    try:
        yield
    except OSError as error:
        if is_lack(error):
            raise NoDescriptors(path, error) from None
        if error.errno in _OF_THE_FILE:
            raise _Damage(f"it cannot be read ({words(error)})") from None
        raise InputError(
            f"{path} cannot be read ({words(error)}): look after its disk or mount, and the same command goes on; a file that "
            "is lost for good is skipped once it is removed (stream.damaged=skip)",
            one_rank=True,
        ) from None


def _left_out(dataset, shard, begin, end):
    first = shard.first_user + begin * dataset.block_users
    last = shard.first_user + min(end * dataset.block_users, shard.users) - 1
    if first >= last:
        return (
            f"user {first} is skipped" if first == last else "no user is skipped for it"
        )
    return f"users {first} to {last} are skipped"


def _blocks(begin, end):
    return (
        f"block {begin} is" if end - begin == 1 else f"blocks {begin} to {end - 1} are"
    )


def _samples(stream):
    """(key, [(name, offset, size), …]) of each run of members with one key; of "a-0.items.low.npy" key "a-0", name
    "items.low.npy". Headers alone are read.

    Not WebDataset's own reader: that one unpacks whatever compression and sparse members a file holds, by which few bytes
    become any number, and lets tarfile follow sizes below 0 in a circle.
    """
    try:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for key, members in itertools.groupby(
                iter(tar.next, None), lambda member: _key_and_name(member)[0]
            ):
                places = []
                for member in members:
                    if (
                        member.issparse()
                        or not 0 <= member.size <= size - member.offset_data
                    ):
                        raise tarfile.ReadError(
                            f"{member.name!r} is sparse or reaches beyond the end of the file"
                        )
                    if member.isreg():
                        places.append(
                            (_key_and_name(member)[1], member.offset_data, member.size)
                        )
                if key and places:
                    yield key, places
    except OSError:  # of the system, not of what it reads
        raise
    except Exception as error:  # of a damaged archive tarfile raises whatever its parsing stumbles over
        raise _Damage(f"it cannot be read ({words(error)})") from None


def _key_and_name(member):
    """ "000001-000002.items.low.npy" → ("000001-000002", "items.low.npy"): a key has no dot."""
    key, _, name = member.name.partition(".")
    return key, name


def _number(key, path):
    found = re.fullmatch(r"(.+)-(\d{6,12})", key, re.ASCII)
    return int(found[2]) if found and found[1] == path.stem else None


def _to_npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _from_npy(data, dtypes, member):
    """The array of a member, which has to be of one axis. Nothing is made before its size is known, and never an object."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, found = read_header(stream)
    except Exception as error:  # a header is Python's own text for a dict: parsing it may fail in many ways
        raise _Damage(
            f"{member} is no array that can be read ({words(error)})"
        ) from None
    if found not in dtypes or len(shape) != 1:
        wanted = " or ".join(map(str, dtypes))
        raise _Damage(
            f"{member} is {words(found)} with {len(shape)} axes, not {wanted} with one"
        )
    held = len(data) - stream.tell()
    if held != shape[0] * found.itemsize:
        raise _Damage(
            f"{member} says that it has {shape[0]} values, but holds {held} bytes"
        )
    return np.frombuffer(data, found, offset=stream.tell())


def _high_dtype(num_embeddings):
    return np.dtype("u1") if num_embeddings <= 2**24 else np.dtype("<u2")


def _unpacked(contents, name, dtype, count):
    """`count` values, as many as the file holds low parts, out of a Zstandard frame, which gets no more room than they take."""
    try:
        unpacked = codec().decompress(contents[name], count * dtype.itemsize)
    except Exception as error:
        raise _Damage(f"{name} cannot be unpacked ({words(error)})") from None
    if len(unpacked) != count * dtype.itemsize:
        raise _Damage(
            f"{name} holds {len(unpacked)} bytes, not {count * dtype.itemsize}"
        )
    return np.frombuffer(unpacked, dtype)


def _crc32(first_user, contents):
    value = zlib.crc32(first_user.to_bytes(8, "little"))
    for content in contents:
        value = zlib.crc32(content, value)
    return value


def _sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
