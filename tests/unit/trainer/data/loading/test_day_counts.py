"""Counting a dataset by item and day: all its events, damaged blocks left out where they may be."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.made import (
    draw_histories,
    draw_ticks,
    spoil_block,
    write_dataset,
)
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading import day_counts
from trainer.data.loading.day_counts import count_recent
from trainer.data.recent_counts import Days, count_pairs
from trainer.errors import InputError

ITEMS = (30, 12)


@pytest.fixture
def made(tmp_path):
    histories = draw_histories(40, ITEMS, longest=12)
    folder = tmp_path / "data"
    dataset = write_dataset(
        folder, histories, ITEMS, cuts=(11, 12, 26), streams=4
    )
    return dataset, histories


def pairs_of(dataset, histories):
    return count_pairs(
        Days.of(dataset),
        np.concatenate(histories),
        np.concatenate(draw_ticks(histories)),
    )


def test_every_event_is_counted_whatever_part_of_the_split_it_is_in(
    made, ranks
):
    dataset, histories = made
    beats = []
    found = count_recent(
        dataset, ranks, StreamConfig(), lambda: beats.append(1)
    )
    keys, events = pairs_of(dataset, histories)
    np.testing.assert_array_equal(found.key_K, keys)
    np.testing.assert_array_equal(found.events_K, events)
    assert found.events_K.sum() == dataset.interactions and beats


def test_the_ranks_shards_together_are_all(made, ranks):
    """What each rank counts, without the exchange."""
    dataset, histories = made
    parts = [
        day_counts._count_home_shards(
            dataset,
            dataclasses.replace(ranks, rank=rank, world_size=3),
            StreamConfig(),
            Days.of(dataset),
            None,
        )
        for rank in range(3)
    ]
    keys, events = day_counts.merge_pairs(parts)
    expected = pairs_of(dataset, histories)
    np.testing.assert_array_equal(keys, expected[0])
    np.testing.assert_array_equal(events, expected[1])


def test_a_damaged_block_is_refused_or_left_out(made, ranks):
    dataset, histories = made
    spoil_block(dataset, 0, 1)
    damaged = Dataset.load(dataset.folder, check_shards=False)
    with pytest.raises(InputError, match=r"shards/000000\.tar"):
        count_recent(damaged, ranks, StreamConfig())
    found = count_recent(damaged, ranks, StreamConfig(damaged="skip"))
    left_out = sum(len(history) for history in histories[3:6])
    assert found.events_K.sum() == dataset.interactions - left_out
