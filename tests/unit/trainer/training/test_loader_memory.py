"""What loaders take of a host: no copy of the table, and what is reckoned for them."""

import gc
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embeddings.config import TableConfig
from embeddings.table import ItemTable
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.load import load_config
from trainer.config.stream import StreamConfig
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.stream import TrainBatches, batches_of_workers
from trainer.data.loading.worker_handover import BatchPacker
from trainer.training.loader_memory import estimate_loader_bytes

ROWS, DIM = 400_000, 64
MB = 2**20


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(10**9)


def memory_of(processes):
    """Bytes that processes have to themselves, or their share of, all together."""
    rolled = [
        Path(f"/proc/{process}/smaps_rollup").read_text()
        for process in processes
    ]
    return sum(
        1024 * int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1])
        for text in rolled
    )


def is_mapped(process, address):
    """Whether a process has memory at an address."""
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        begin, end = line.split()[0].split("-")
        if int(begin, 16) <= address < int(end, 16):
            return True
    return False


@pytest.mark.ranks
def test_a_loader_has_no_copy_of_a_table_that_is_updated(ranks):
    """Neither the pages that it was forked with, nor those that the trainer has written to since."""
    table = ItemTable(ROWS, DIM, TableConfig(optimizer="sgd"), 0, "cpu")
    size = 4 * ROWS * DIM
    step = ROWS // 100

    def update():
        """Every row, a few in each step."""
        for first in range(0, ROWS, step):
            table(torch.arange(first, first + step))
            table.update(torch.ones(step, DIM))

    update()  # what a step takes for itself is there from now on
    before = set(multiprocessing.active_children())
    stream = batches_of_workers(
        Numbers(), StreamConfig(workers=1), pin_memory=False
    )
    next(stream)
    (loader,) = set(multiprocessing.active_children()) - before
    gc.collect()
    begun = memory_of(["self", loader.pid])
    update()
    next(stream)
    gc.collect()
    grown = memory_of(["self", loader.pid]) - begun
    address = table.shard()[1]["weight"].data_ptr()
    mapped = [is_mapped(process, address) for process in ("self", loader.pid)]
    stream.close()
    assert size > 90 * MB
    assert grown < size / 2
    assert mapped == [True, False]


def test_what_is_reckoned_is_what_batches_take(tmp_path):
    """With something to spare: of few items a batch has hardly any rows."""
    histories = draw_histories(300, (50, 40), longest=60)
    dataset = write_dataset(
        tmp_path / "data", histories, (50, 40), block_users=64
    )
    for settings in (
        ["negatives.per_target=1", "negatives.shared=0"],
        ["negatives.per_target=8", "negatives.shared=0"],
        ["negatives.shared=64"],
    ):
        config = load_config(
            [],
            [
                f"data={dataset.folder}",
                "global_batch_size=300",
                "stream.workers=3",
                *settings,
            ],
        )
        plan = BatchSchedule(dataset, 300, 1, 0, shuffle=False)
        batches = TrainBatches(
            plan,
            0,
            0,
            config.model.max_length,
            "mean",
            config.negatives,
            config.stream,
        )
        piece = len(BatchPacker(shared=False)(next(iter(batches)).batch).piece)
        pieces = (config.stream.prefetch + 2) * 2 * 3
        reckoned = (
            estimate_loader_bytes(config, dataset, 1) - 2 * 3 * 160 * 10**6
        ) / pieces
        assert 0.9 * piece < reckoned < 2 * piece
        assert (
            estimate_loader_bytes(
                replace(config, stream=replace(config.stream, workers=0)),
                dataset,
                1,
            )
            == 0
        )
