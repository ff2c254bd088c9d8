"""The file of each target's positions, as studies read it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.evaluation.user_ranks import UserRanks, read_ranks, write_ranks

COLUMNS = {
    "user": [3, 5, 5],
    "domain": [0, 1, 0],
    "sampled": [1, 7, 2],
    "full": [4, 90, 8],
}


def test_targets_whose_item_training_has_not_seen_are_left_out(tmp_path):
    arrays = {name: np.array(values) for name, values in COLUMNS.items()}
    ranks = UserRanks(
        **arrays,
        target=np.array([3, 5, 6]),
        seen=np.array([True, False, True]),
        sampled_with_recency=np.array([2, 3, 1]),
        full_with_recency=np.array([5, 6, 7]),
    )
    write_ranks(tmp_path / "ranks.parquet", ranks)
    found = read_ranks(tmp_path / "ranks.parquet")
    assert {name: values.tolist() for name, values in found.items()} == {
        "user": [3, 5],
        "domain": [0, 0],
        "sampled": [1, 2],
        "full": [4, 8],
        "target": [3, 6],
        "sampled_with_recency": [2, 1],
        "full_with_recency": [5, 7],
    }


def test_a_file_of_before_is_read(tmp_path):
    pq.write_table(pa.table(COLUMNS), tmp_path / "ranks.parquet")
    found = read_ranks(tmp_path / "ranks.parquet")
    assert found["target"].tolist() == COLUMNS["user"]
    assert found["full"].tolist() == COLUMNS["full"]
    assert not found["full_with_recency"].any()
