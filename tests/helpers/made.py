"""Small real datasets on disk: shards, vocabularies and users as prepare leaves them, with contents that a test chooses."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.format.dataset import (
    LENGTHS,
    LENGTHS_DTYPE,
    TICKS,
    USERS,
    Dataset,
    Domain,
    File,
    Shard,
)
from trainer.data.format.shards import Block, write_shard
from trainer.data.split import SPLIT_LENGTH

ROOM = 3  # rows that a domain keeps for later items


def write_dataset(
    folder,
    histories,
    items=(5, 4),
    cuts=(),
    streams=1,
    block_users=3,
    user_ids=None,
    item_ids=None,
    ticks=None,
):
    """Users 0 … with the given rows of M, oldest first. items: of each domain; cuts: users at which a new shard begins.

    user_ids, item_ids: raw ids, item_ids by domain; texts like "u0" and "d0-0" where they are left out. ticks: when each user's
    interactions were, `draw_ticks` of them where they are left out; times are ticks.
    """
    ticks = draw_ticks(histories) if ticks is None else ticks
    for name in ("shards", "vocabulary"):
        (folder / name).mkdir(parents=True)
    starts = np.cumsum([0, *(count + ROOM for count in items[:-1])])
    rows = int(starts[-1] + items[-1] + ROOM)
    shards = []
    for number, (first, last) in enumerate(
        zip([0, *cuts], [*cuts, len(histories)], strict=True)
    ):
        name = f"shards/{number:06d}.tar"
        size, sha256 = write_shard(
            folder / name,
            first,
            rows,
            _blocks(histories, ticks, first, last, block_users),
        )
        interactions = sum(len(history) for history in histories[first:last])
        shards.append(
            Shard(name, last - first, first, interactions, size, sha256)
        )
    training = [
        np.asarray(h[:-2] if len(h) >= SPLIT_LENGTH else h, np.int64)
        for h in histories
    ]
    counts = np.bincount(np.concatenate(training), minlength=rows)
    lengths_UD = [
        np.bincount(
            np.searchsorted(starts, part, side="right") - 1,
            minlength=len(items),
        )
        for part in training
    ]
    np.save(folder / LENGTHS, np.array(lengths_UD).astype(LENGTHS_DTYPE))
    domains = []
    for number, (start, count) in enumerate(zip(starts, items, strict=True)):
        name, own = (
            f"vocabulary/{number}.parquet",
            np.arange(start, start + count),
        )
        ids = (
            item_ids[number]
            if item_ids
            else [f"d{number}-{item}" for item in range(count)]
        )
        pq.write_table(
            pa.table({"item_id": ids, "row": own, "count": counts[own]}),
            folder / name,
        )
        domains.append(
            Domain(
                f"domain {number}",
                int(start),
                count,
                count + ROOM,
                0,
                0,
                {},
                name,
            )
        )
    users = np.arange(len(histories))
    pq.write_table(
        pa.table(
            {
                "user_id": user_ids or [f"u{user}" for user in users],
                "user": users,
            }
        ),
        folder / USERS,
    )
    lengths = [len(history) for history in histories]
    dataset = Dataset(
        folder=folder,
        seed=0,
        users=len(histories),
        interactions=sum(lengths),
        too_short=sum(length < SPLIT_LENGTH for length in lengths),
        max_length=max(lengths),
        first_time=0.0,
        last_time=float(TICKS),
        block_users=block_users,
        streams=streams,
        domains=tuple(domains),
        shards=tuple(shards),
        files=tuple(
            File.of(folder, name)
            for name in (
                USERS,
                LENGTHS,
                *(domain.vocabulary for domain in domains),
            )
        ),
    )
    dataset.save()
    return Dataset.load(folder)


def draw_histories(users, items=(5, 4), longest=9, seed=0):
    """Histories of 1 … longest interactions over all domains."""
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *(count + ROOM for count in items[:-1])])
    rows = np.concatenate(
        [
            start + np.arange(count)
            for start, count in zip(starts, items, strict=True)
        ]
    )
    return [
        random.choice(rows, size=random.integers(1, longest + 1))
        for _ in range(users)
    ]


def draw_ticks(histories, seed=0):
    """Rising times of histories, uint16."""
    random = np.random.default_rng(seed)
    return [
        np.sort(random.integers(0, TICKS + 1, len(history))).astype(np.uint16)
        for history in histories
    ]


def npy(array, **options):
    """An array as the bytes of a file."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def read_tar(path):
    """The members of a tar by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write_tar(path, members):
    """Members by name, or as pairs, one of which may then come twice; a value may be a TarInfo without content."""
    with tarfile.open(path, "w") as tar:
        for name, data in (
            members.items() if isinstance(members, dict) else members
        ):
            info = (
                data
                if isinstance(data, tarfile.TarInfo)
                else tarfile.TarInfo(name)
            )
            if info is not data:
                info.size = len(data)
            tar.addfile(info, None if info is data else io.BytesIO(data))


def spoil_block(dataset, shard, block):
    """Turns one bit of the block's items, so that it is one item less or more: nothing but a checksum can tell."""
    path = dataset.folder / dataset.shards[shard].name
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{path.stem}-{block:06d}.items.low.npy")
    content[member.offset_data + member.size - 2] ^= 1
    path.write_bytes(content)


def _blocks(histories, ticks, first, last, block_users):
    for begin in range(first, last, block_users):
        users = np.arange(begin, min(begin + block_users, last))
        own = [np.asarray(histories[user], np.int32) for user in users]
        when = np.concatenate([ticks[user] for user in users])
        yield Block(
            np.array([len(history) for history in own], np.int32),
            np.concatenate(own),
            when,
        )
