"""What the vocabularies of a dataset say of its items."""

import numpy as np

from trainer.data.format.dataset import Dataset


def item_counts(dataset: Dataset) -> np.ndarray:
    """`Dataset.item_counts`, which is read once in a process."""
    return dataset.item_counts


def item_ids(dataset, domain):
    """The raw ids of a Domain's items in the order of their rows, of the type that they came with: a pyarrow array."""
    import pyarrow.parquet as pq

    columns = pq.read_table(
        dataset.local(domain.vocabulary), columns=["item_id", "row"]
    )
    return columns.sort_by("row")["item_id"].combine_chunks()
