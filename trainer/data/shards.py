"""Shards: WebDataset tars in which one sample is a block of users in jagged arrays.

Members of a sample: `users.npy` (int64, (B,)), `lengths.npy` (int32, (B,)) and `items.npy` (int32, (N,), N = sum of the
lengths), where `items` are rows of M, each user's history oldest first.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from trainer.data.dataset import Dataset, Shard
from trainer.errors import InputError

_DTYPES = {"users": np.dtype("<i8"), "lengths": np.dtype("<i4"), "items": np.dtype("<i4")}


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
            arrays = {"users": block.users_B, "lengths": block.lengths_B, "items": block.items_N}
            members = {f"{name}.npy": _to_npy(array, _DTYPES[name]) for name, array in arrays.items()}
            tar.write({"__key__": f"{path.stem}-{number:06d}", **members})
    return path.stat().st_size, _sha256(path)


def read_blocks(dataset: Dataset, shard: Shard, verify: bool = True) -> Iterator[Block]:
    """Yields the blocks of a shard in order.

    verify: compare the file's sha256 with `dataset.json` before the first block.
    Raises InputError, naming the file: it is missing or unreadable, its checksum is wrong, a member is missing or of
    another dtype, lengths do not add up, a user or a row is out of range.
    """
    path = dataset.folder / shard.name
    try:
        if verify and _sha256(path) != shard.sha256:
            raise _refusal(path, "its sha256 is not the one in dataset.json")
        user = shard.first_user
        with open(path, "rb") as stream:
            # group_by_keys wants to know where a member came from; the tar itself does not say.
            members = ({**member, "__url__": str(path)} for member in tar_file_iterator(stream))
            for sample in group_by_keys(members):
                block = _to_block(sample, path)
                _check(block, user, dataset.num_embeddings, f"{path}: block {sample['__key__']}")
                user += len(block.users_B)
                yield block
    except (OSError, tarfile.TarError, ValueError) as error:
        raise _refusal(path, f"it cannot be read ({error})") from None
    if user != shard.first_user + shard.users:
        raise _refusal(path, f"it holds {user - shard.first_user} users, dataset.json says {shard.users}")


def _refusal(where, what):
    return InputError(f"{where}: {what}: copy the file again or prepare the dataset again")


def _to_npy(array, dtype):
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return stream.getvalue()


def _to_block(sample, path):
    arrays = []
    for name, dtype in _DTYPES.items():
        member = f"{sample['__key__']}.{name}.npy"
        if f"{name}.npy" not in sample:
            raise _refusal(path, f"the member {member} is missing")
        array = np.lib.format.read_array(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False)
        if array.dtype != dtype or array.ndim != 1:
            raise _refusal(path, f"{member} is {array.dtype} with {array.ndim} axes, not {dtype} with one")
        arrays.append(array)
    return Block(*arrays)


def _check(block, first_user, num_embeddings, where):
    users, lengths, items = block.users_B, block.lengths_B, block.items_N
    if len(users) != len(lengths) or not np.array_equal(users, np.arange(first_user, first_user + len(users))):
        raise _refusal(where, f"users are not the {len(lengths)} from {first_user} on")
    if (lengths < 1).any() or lengths.sum(dtype=np.int64) != len(items):
        raise _refusal(where, f"lengths do not add up to the {len(items)} items")
    if len(items) and not 0 <= items.min() <= items.max() < num_embeddings:
        raise _refusal(where, f"an item is outside the {num_embeddings} rows of the item matrix")


def _sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
