"""Host memory that data loaders take, estimated before a table is placed beside them."""

import math

from trainer.config.run import RunConfig
from trainer.config.stream import MEASURED
from trainer.data.format.dataset import Dataset

# Bytes of a loader's own: of Python's, those that it writes to, and decoded blocks.
_PROCESS = 160 * 10**6
# Bytes of a batch for each interaction: both views, their targets, the items (measured: 118 to
# 136).
_INTERACTION = 144
_NEGATIVE = 8  # and for each drawn negative
# Batches beside those that are prefetched: one is built, one is computed with.
_IN_HAND = 2
# A piece of shared memory is larger than its first batch by a quarter
# (trainer/data/loading/worker_handover.py).
_SPARE = 1.25


def estimate_loader_bytes(
    config: RunConfig, dataset: Dataset, world_size: int
) -> int:
    """Estimates the bytes that a rank's loaders take of the host.

    They are those that build batches, and as many that a validation starts. Where their number is
    to be measured one is counted: more are started only where steps are quick.
    """
    workers = _count_workers(config)
    shared = estimate_shared_bytes(config, dataset, world_size)
    return 2 * workers * _PROCESS + shared


def estimate_shared_bytes(
    config: RunConfig, dataset: Dataset, world_size: int
) -> int:
    """Estimates what a rank's loaders take of /dev/shm, in which they hand their batches over.

    It is a part of `estimate_loader_bytes`.
    """
    batches = config.stream.prefetch + _IN_HAND
    piece = _SPARE * estimate_batch_bytes(config, dataset, world_size)
    return int(2 * _count_workers(config) * batches * piece)


def _count_workers(config: RunConfig) -> int:
    """Loaders of a rank; one where their number is to be measured."""
    if config.stream.workers == MEASURED:
        return 1
    return config.stream.workers


def estimate_batch_bytes(
    config: RunConfig, dataset: Dataset, world_size: int
) -> float:
    """Estimates the bytes of a rank's batch, of users with a mean number of interactions."""
    # A batch has at most everyone.
    most_users = min(config.global_batch_size, max(1, dataset.users))
    users = math.ceil(most_users / world_size)
    mean_length = dataset.interactions / max(1, dataset.users)
    length = min(config.model.max_length, mean_length)
    negatives = config.negatives
    interaction = _INTERACTION
    if not negatives.shared:
        interaction += _NEGATIVE * negatives.per_target
    shared = negatives.shared * len(dataset.domains)
    return users * length * interaction + _NEGATIVE * shared
