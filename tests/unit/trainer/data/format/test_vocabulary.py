import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.made import draw_histories, write_dataset
from trainer.data.format.dataset import Dataset
from trainer.errors import InputError


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", draw_histories(20))


def test_counts_are_those_of_the_vocabularies(dataset):
    expected = np.zeros(dataset.num_embeddings, np.int64)
    for domain in dataset.domains:
        for line in pq.read_table(
            dataset.folder / domain.vocabulary
        ).to_pylist():
            expected[line["row"]] = line["count"]
    assert dataset.item_counts.tolist() == expected.tolist() and expected.any()


@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_a_vocabulary_that_cannot_be_read_is_named(dataset, content):
    path = dataset.folder / dataset.domains[1].vocabulary
    if content is None:
        pq.write_table(pq.read_table(path).slice(1), path)
    else:
        path.write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"{dataset.domains[1].vocabulary} .*prepare the dataset again",
    ):
        Dataset.item_counts.func(dataset)
