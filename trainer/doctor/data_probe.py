"""What a rank finds of the dataset: whether it fits beside it, and how fast shards are read."""

import os
import time
from collections.abc import Iterator

import torch

from embeddings.control_groups import available_host_memory
from embeddings.placement import Room, count_ranks_of_host
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import Block, read_blocks
from trainer.distributed.process_group import Ranks
from trainer.doctor.deadline import Unanswered, call_with_deadline
from trainer.doctor.facts import DataFacts
from trainer.errors import InputError
from trainer.files.redact import printable_text, redact_location
from trainer.planning.memory import plan_table
from trainer.training.loader_memory import estimate_shared_bytes

_SECONDS = 30.0
_READ_SECONDS = 1.0


def examine_data(config: RunConfig, ranks: Ranks) -> DataFacts:
    """The facts of this rank about the dataset of the settings. Not collective."""
    try:
        return call_with_deadline(lambda: _look(config, ranks), _SECONDS)
    except InputError as error:
        return DataFacts(problem=printable_text(error))
    except (Unanswered, OSError) as error:
        place = redact_location(config.data)
        return DataFacts(problem=f"{place}: {printable_text(error)}")


def _look(config: RunConfig, ranks: Ranks) -> DataFacts:
    """Opens the dataset, reads for a second, reckons what it takes. Raises InputError.

    Files are not read whole: a training does that, and names a damaged one.
    """
    check_shards = config.stream.damaged == "stop"
    dataset = Dataset.load(config.data, check_shards, config.stream, False)
    read_bytes, read_users = _measure_reading(dataset, ranks)
    capacity = ""
    no_room = ""
    try:
        capacity = _plan_memory(config, dataset, ranks)
    except ValueError as error:
        no_room = str(error)
    return DataFacts(
        fingerprint=dataset.fingerprint,
        capacity=capacity,
        no_room=no_room,
        shm_need=estimate_shared_bytes(config, dataset, ranks.world_size),
        read_bytes=read_bytes,
        read_users=read_users,
    )


def _plan_memory(config: RunConfig, dataset: Dataset, ranks: Ranks) -> str:
    """What the table takes of this rank. Raises ValueError where it does not fit."""
    on_device = None
    if ranks.device.type == "cuda":
        on_device, _ = torch.cuda.mem_get_info(ranks.device)
    on_host = available_host_memory() // count_ranks_of_host()
    room = Room(on_device, on_host)
    capacity = plan_table(config, dataset, ranks.world_size, room)
    return str(capacity)


def _measure_reading(dataset: Dataset, ranks: Ranks) -> tuple[float, float]:
    """Bytes of shards and users a second, read as a run does: each rank its own shards, all at once.

    Of six shards and two ranks:

        rank 0    shards 0, 2, 4      until a second is over
        rank 1    shards 1, 3, 5

    A local file's pages are dropped before, so that the disk is read where nobody else holds them.
    """
    begun = time.monotonic()
    users = 0
    share = 0.0  # of the bytes of the shards
    for number in range(ranks.rank, len(dataset.shards), ranks.world_size):
        shard = dataset.shards[number]
        _drop_pages(dataset, shard.name)
        before = users
        for block in _blocks(dataset, number):
            users += len(block.lengths_B)
            if time.monotonic() > begun + _READ_SECONDS:
                break
        share += shard.bytes * (users - before) / shard.users
        if time.monotonic() > begun + _READ_SECONDS:
            break
    seconds = time.monotonic() - begun
    return share / seconds, users / seconds


def _blocks(dataset: Dataset, number: int) -> Iterator[Block]:
    """The blocks of a shard; damaged ones are left out, a training names them."""
    shard = dataset.shards[number]
    for _, block in read_blocks(
        dataset, shard, report=lambda line: None, whole=False
    ):
        yield block


def _drop_pages(dataset: Dataset, name: str) -> None:
    """Has the kernel forget a file's pages, as far as it lets itself be told."""
    if dataset.cache:
        return
    descriptor = os.open(dataset.folder / name, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
