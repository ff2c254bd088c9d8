"""What a step brings is what the run's own batches have."""

import numpy as np
import pytest

from syncrec.batch.build import build_batch, trim
from tests.helpers.made import draw_histories, write_dataset
from trainer.config import load_config
from trainer.data.split import SPLIT_LENGTH
from trainer.planning.batch_load import count_rows, measure_load, reached

HISTORIES = draw_histories(40, longest=20)
SETTINGS = [
    "global_batch_size=8",
    "model.max_length=4",
    "negatives.shared=3",
    "stream.shuffle=false",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Forty users in four streams."""
    return write_dataset(
        tmp_path_factory.mktemp("load") / "data",
        HISTORIES,
        cuts=(10, 20, 30),
        streams=4,
    )


def test_what_views_reach_is_what_trim_leaves(dataset):
    users = np.arange(40)
    kept_BD = reached(dataset, users, 4)
    for user, history in enumerate(HISTORIES):
        whole = len(history) < SPLIT_LENGTH
        items = np.asarray(history if whole else history[:-2], np.int64)
        domain = dataset.domain_of(items)
        _, lengths, _ = trim(items, np.array([len(items)]), domain, 4)
        assert kept_BD[user].sum() == lengths.sum()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_batch(dataset, ranks):
    config = load_config([], SETTINGS)
    load = measure_load(config, dataset, ranks)
    assert load.users == 8 // ranks
    assert load.steps == 5
    assert load.imbalance >= 1
    assert load.most_tokens >= load.tokens
    assert len(load.sample) == load.users
    alone = measure_load(config, dataset, 1)
    assert load.tokens == pytest.approx(alone.tokens / ranks)
    assert load.interactions == pytest.approx(alone.interactions / ranks)
    assert load.rows < alone.rows or ranks == 1


def test_rows_are_as_many_as_popularity_has_them(dataset):
    config = load_config([], SETTINGS)
    uses_D = np.array([6.0, 5.0])
    random = np.random.default_rng(0)
    counts = []
    for _ in range(2000):
        rows = []
        for domain, uses in zip(dataset.domains, (6, 5), strict=True):
            end = domain.start + domain.items
            popularity = dataset.item_counts[domain.start : end]
            items = np.arange(domain.start, end)
            share = popularity / popularity.sum()
            rows.append(random.choice(items, uses, p=share))
            rows.append(random.choice(items, config.negatives.shared))
        counts.append(len(np.unique(np.concatenate(rows))))
    expected = count_rows(config, dataset, uses_D)
    assert expected == pytest.approx(np.mean(counts), rel=0.02)


def test_the_sample_can_be_packed_again(dataset):
    config = load_config([], SETTINGS)
    load = measure_load(config, dataset, 2)
    kept_BD = reached(dataset, load.sample, 4)
    domain_N = np.concatenate([np.repeat([0, 1], kept) for kept in kept_BD])
    batch = build_batch(
        dataset.starts[domain_N],
        kept_BD.sum(1),
        domain_N,
        np.ones(len(load.sample), np.float32),
        [np.array([0]), np.array([8])],
        [5, 4],
        4,
    )
    # The schedule counts one more a user: the newest interaction is no input.
    assert batch.interactions == kept_BD.sum()
