"""What is measured on: batches of a training step, drawn from counters, whose dataset needs no
file, and a small prepared one.

In those batches domains share items and interactions evenly, and items are drawn uniformly
unless told otherwise: popular items would stay in the caches, so this is the hard case for a
large table.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.counter_rng import (
    permutation,
    random_below,
    random_bits,
    random_unit,
)
from trainer.data.format.dataset import Dataset, Domain, Shard
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.negative_sampling import (
    draw_shared_negatives,
    draw_target_negatives,
)
from trainer.training.step import Trainer

if TYPE_CHECKING:
    from syncrec.config import ModelConfig
    from trainer.config.negatives import NegativesConfig
    from trainer.distributed.process_group import Ranks


_SEED = 0
_LENGTHS = 1
_DOMAINS = 2
_ITEMS = 3
_NAMES = (
    "shop",
    "video",
    "navi",
    "coupon",
    "music",
    "books",
    "games",
    "travel",
)


def dataset_of(
    items: int, domains: int, users: int, steps: int, streams: int = 1
) -> Dataset:
    """A `Dataset` of so many items, with users for so many steps of `users`; its files do not
    exist.

    streams: as many ranks as there are at most.
    """
    ends = np.arange(domains + 1) * items // domains
    percentiles = {"p5": 0, "p50": 0, "p95": 0, "max": 0}
    names = [*_NAMES, *(f"domain-{n}" for n in range(len(_NAMES), domains))]
    ranges = zip(
        names[:domains],
        ends[:-1].tolist(),
        np.diff(ends).tolist(),
        strict=True,
    )
    owned = tuple(
        Domain(name, start, room, room, 0, 0, percentiles, "")
        for name, start, room in ranges
    )
    of_each = users * steps // streams
    shards = [
        Shard(
            name="",
            users=of_each,
            first_user=i * of_each,
            interactions=0,
            bytes=0,
            sha256="",
        )
        for i in range(streams)
    ]
    return Dataset(
        Path(),
        _SEED,
        of_each * streams,
        0,
        0,
        0,
        0.0,
        1.0,
        1024,
        streams,
        owned,
        tuple(shards),
        (),
    )


def draw(
    dataset: Dataset,
    step: int,
    users: int,
    shortest: int,
    longest: int,
    negatives: "NegativesConfig",
    exponent: float = 0.0,
) -> tuple:
    """What `syncrec.batch.build.build_batch` takes first: items_N, lengths_B, domain_N,
    weight_B, negatives.

    Lengths stand evenly between `shortest` and `longest`, so that every step has as many
    interactions. negatives: a `trainer.config.negatives.NegativesConfig`. exponent: the n-th
    item of a domain is drawn as often as n ** −exponent says (Zipf's law); 0: all alike.
    Negatives are drawn uniformly, as the trainer draws them.
    """
    lengths_B = np.linspace(shortest, longest, users).round().astype(np.int64)
    lengths_B = lengths_B[permutation(users, _SEED, _LENGTHS, step)]
    total = int(lengths_B.sum())
    domain_N = random_below(
        random_bits(_SEED, _DOMAINS, step, np.arange(total)),
        len(dataset.domains),
    )
    items_D = np.array([domain.items for domain in dataset.domains])
    bits_N = random_bits(_SEED, _ITEMS, step, np.arange(total))
    items_N = dataset.starts[domain_N] + _popular(
        bits_N, items_D[domain_N], exponent
    )
    if negatives.shared:
        drawn = draw_shared_negatives(
            _SEED, 0, step, dataset.starts, items_D, negatives.shared
        )
    else:
        position_N = np.arange(total) - np.repeat(
            np.cumsum(lengths_B) - lengths_B, lengths_B
        )
        user_N = np.repeat(step * users + np.arange(users), lengths_B)
        drawn = draw_target_negatives(
            _SEED,
            0,
            user_N,
            position_N,
            items_N,
            domain_N,
            dataset.starts,
            items_D,
            negatives.per_target,
        )
    return items_N, lengths_B, domain_N, np.ones(users, np.float32), drawn


def trainer_of(
    model: "ModelConfig",
    users: int,
    dataset: Dataset,
    ranks: "Ranks",
    **given: Any,
) -> Trainer:
    """A `Trainer` of `users` users a rank; given: more of a RunConfig."""
    config = RunConfig(
        global_batch_size=users * ranks.world_size, model=model, **given
    )
    return Trainer(
        config,
        ranks,
        dataset,
        BatchSchedule(
            dataset, config.global_batch_size, ranks.world_size, config.seed
        ),
    )


def _popular(bits, items_N, exponent):
    """Items (from 0) of domains of so many, int64: the most popular first."""
    if not exponent:
        return random_below(bits, items_N)
    item_N = np.empty(len(bits), np.int64)
    for items in np.unique(items_N):
        here = items_N == items
        upto = np.cumsum(np.arange(1, items + 1) ** -exponent)
        item_N[here] = np.searchsorted(
            upto / upto[-1], random_unit(bits[here]), side="right"
        )
    return np.minimum(
        item_N, items_N - 1
    )  # where rounding leaves the last share below 1


def some_data(settings: Any) -> None:
    """Raises ValueError where settings name neither `data`, a folder, nor `users` of a dataset
    to be made.
    """
    if not settings.data and settings.users < 1:
        raise ValueError(
            "give data=DATA, a folder that launch/prepare.py made, or users=… of a "
            "synthetic dataset"
        )


def prepared(folder: Path, users: int) -> Path:
    """A small synthetic dataset of nine domains, prepared in `folder`: the dataset's own folder."""
    # DuckDB comes with them, which a training step has no use for.
    from trainer.config.prepare import PrepareConfig, SyntheticConfig
    from trainer.data.prepare.pipeline import prepare
    from trainer.data.synthetic import synthesize_logs

    synthesize_logs(
        folder / "logs",
        SyntheticConfig(users=users, items=20_000, domains=9, mean_length=60),
    )
    prepare(
        PrepareConfig(
            inputs=(str(folder / "logs"),),
            output=str(folder / "data"),
            streams=16,
            memory="1GB",
        )
    )
    return folder / "data"


def described(dataset: Dataset) -> dict:
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
