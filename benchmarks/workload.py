"""What is measured on: batches of a training step, drawn from counters, whose dataset needs no file, and a small prepared one.

In those batches domains share items and interactions evenly, and items are drawn uniformly: popular items would stay in the
caches, so this is the hard case for a large table.
"""

from pathlib import Path

import numpy as np

from trainer.data.dataset import Dataset, Domain, Shard
from trainer.data.negatives import shared_negatives, target_negatives
from trainer.data.prepare import PrepareConfig, prepare
from trainer.data.random import permutation, random_below, random_bits
from trainer.data.synthetic import SyntheticConfig, synthesize

_SEED, _LENGTHS, _DOMAINS, _ITEMS = 0, 1, 2, 3
_NAMES = ("shop", "video", "navi", "coupon", "music", "books", "games", "travel")


def dataset_of(items, domains, users, steps):
    """A `Dataset` of so many items, with users for so many steps of `users`; its files do not exist."""
    ends = np.arange(domains + 1) * items // domains
    percentiles = {"p5": 0, "p50": 0, "p95": 0, "max": 0}
    ranges = zip(_NAMES, ends[:-1].tolist(), np.diff(ends).tolist(), strict=False)
    owned = tuple(Domain(name, start, room, room, 0, 0, percentiles, "") for name, start, room in ranges)
    shard = Shard(name="", users=users * steps, first_user=0, interactions=0, bytes=0, sha256="")
    return Dataset(Path(), _SEED, users * steps, 0, 0, 0, 1024, 1, owned, (shard,), ())


def draw(dataset, step, users, shortest, longest, negatives):
    """What `syncrec.batch.build_batch` takes first: items_N, lengths_B, domain_N, weight_B, negatives.

    Lengths stand evenly between `shortest` and `longest`, so that every step has as many interactions. negatives: a
    `trainer.data.negatives.NegativesConfig`.
    """
    lengths_B = np.linspace(shortest, longest, users).round().astype(np.int64)
    lengths_B = lengths_B[permutation(users, _SEED, _LENGTHS, step)]
    total = int(lengths_B.sum())
    domain_N = random_below(random_bits(_SEED, _DOMAINS, step, np.arange(total)), len(dataset.domains))
    items_D = np.array([domain.items for domain in dataset.domains])
    items_N = dataset.starts[domain_N] + random_below(random_bits(_SEED, _ITEMS, step, np.arange(total)), items_D[domain_N])
    if negatives.shared:
        drawn = shared_negatives(_SEED, 0, step, dataset.starts, items_D, negatives.shared)
    else:
        position_N = np.arange(total) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
        user_N = np.repeat(step * users + np.arange(users), lengths_B)
        drawn = target_negatives(_SEED, 0, user_N, position_N, items_N, domain_N, dataset.starts, items_D, negatives.per_target)
    return items_N, lengths_B, domain_N, np.ones(users, np.float32), drawn


def some_data(settings):
    """Raises ValueError where settings name neither `data`, a folder, nor `users` of a dataset to be made."""
    if not settings.data and settings.users < 1:
        raise ValueError("give data=DATA, a folder that launch/prepare.py made, or users=… of a synthetic dataset")


def prepared(folder, users):
    """A small synthetic dataset of nine domains, prepared in `folder`: the dataset's own folder."""
    synthesize(folder / "logs", SyntheticConfig(users=users, items=20_000, domains=9, mean_length=60))
    prepare(PrepareConfig(inputs=(str(folder / "logs"),), output=str(folder / "data"), streams=16, memory="1GB"))
    return folder / "data"


def described(dataset):
    """What a record says of a dataset."""
    return {
        "users": dataset.users,
        "interactions": dataset.interactions,
        "domains": len(dataset.domains),
        "rows": dataset.num_embeddings,
        "shards": len(dataset.shards),
        "bytes": sum(shard.bytes for shard in dataset.shards),
        "streams": dataset.streams,
        "block_users": dataset.block_users,
        "fingerprint": dataset.fingerprint,
    }
