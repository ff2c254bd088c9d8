"""Where a copy a host pays: its rows are those of a draw, and few items make it the better way."""

import numpy as np
import pytest

from benchmarks import copies


def test_distinct_rows_are_those_of_a_draw():
    random = np.random.default_rng(0)
    items, uses, exponent = 500, 400, 0.7
    share = np.arange(1, items + 1) ** -exponent
    counts = []
    for _ in range(200):
        popular = random.choice(items, uses, p=share / share.sum())
        even = random.integers(0, items, uses)
        counts.append(len(np.unique(np.concatenate([popular, even]))))
    expected = copies.distinct(items, exponent, uses)
    assert expected == pytest.approx(np.mean(counts), rel=0.01)


def test_a_copy_a_host_pays_where_batches_have_the_same_rows():
    settings = copies.Settings(
        64, [10_000, 1_000_000], [0.7], [100], 2e6, "fp32"
    )
    few, many = copies.predictions(settings)
    per_host = 8
    for case, pays in ((few, True), (many, False)):
        rows = case["rows"]
        exchanged = rows["host"] + rows["all"]
        assert (exchanged < 2 * per_host * rows["rank"]) == pays
        assert (case["two"]["leaving"] < case["one"]["leaving"]) == pays
        assert (case["two"]["seconds"] < case["one"]["seconds"]) == pays
    shown = copies.table({"predictions": [few, many]})
    assert shown.count("\n") == 3 and "1,000,000" in shown
