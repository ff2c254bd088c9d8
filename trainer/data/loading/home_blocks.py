"""One pass over the shards by all ranks together, before anything is trained or ranked.

Each rank reads the shards of its own streams. So every block is read once, at any number of ranks;
what a rank has counted is then summed over all of them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import Block, read_blocks
from trainer.data.loading.batch_schedule import BatchSchedule

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks


def read_home_blocks(
    dataset: Dataset, ranks: "Ranks", config: StreamConfig
) -> Iterator[tuple[int, Block]]:
    """Yields (number of the first user, block) of a rank's own shards, in rising order.

    config: its `verify` and `damaged` count. Blocks that are skipped are not told of: whoever ranks
    or trains on them does, and compares whole files. Raises InputError as `ShardFile` does.
    """
    schedule = BatchSchedule(
        dataset,
        ranks.world_size,
        ranks.world_size,
        seed=0,
        shuffle=False,
        balance=False,
    )
    shards = []
    for number in sorted(schedule.home_shards(0, ranks.rank)):
        shards.append(dataset.shards[number])
    report = _say_nothing if config.damaged == "skip" else None
    for index, shard in enumerate(shards):
        dataset.ahead([later.name for later in shards[index + 1 :]])
        yield from read_blocks(
            dataset, shard, config.verify, report, whole=False
        )


def _say_nothing(_line: str) -> None:
    """Takes the place of a report."""
