"""What loaders take of a host, reckoned before a table is planned beside them."""

from trainer.config.run import RunConfig
from trainer.config.stream import MEASURED
from trainer.data.format.dataset import Dataset

_PROCESS = (
    160 * 10**6
)  # bytes of a loader's own: of Python's, those that it writes to, and decoded blocks
_INTERACTION = 144  # bytes of a batch for each interaction: both views, their targets, the items (measured: 118 to 136)
_NEGATIVE = 8  # and for each drawn negative
_IN_HAND = (
    2  # batches beside those that are kept ready: one is built, one is computed with
)
_SPARE = 1.25  # a piece of shared memory is larger than its first batch by a quarter (trainer/data/loading/worker_handover.py)


def loader_bytes(config: RunConfig, dataset: Dataset, world_size: int) -> int:
    """Bytes that a rank's loaders take of the host: those that build batches, and as many that a validation starts.

    Where their number is to be measured one is counted: more are started only where steps are quick.
    """
    workers = 1 if config.stream.workers == MEASURED else config.stream.workers
    users = -(-config.global_batch_size // world_size)
    length = min(config.model.max_length, dataset.interactions / max(1, dataset.users))
    negatives = 0 if config.negatives.shared else config.negatives.per_target
    shared = config.negatives.shared * len(dataset.domains)
    piece = _SPARE * (
        users * length * (_INTERACTION + _NEGATIVE * negatives) + _NEGATIVE * shared
    )
    return int(2 * workers * (_PROCESS + (config.stream.prefetch + _IN_HAND) * piece))
