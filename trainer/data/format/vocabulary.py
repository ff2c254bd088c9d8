"""Vocabularies: the raw ids and the popularity of a dataset's items."""

from typing import TYPE_CHECKING

import numpy as np

from trainer.data.format.dataset import Dataset, Domain

if TYPE_CHECKING:
    import pyarrow as pa


def read_item_counts(dataset: Dataset) -> np.ndarray:
    """Returns `Dataset.item_counts`, which is read once in a process."""
    return dataset.item_counts


def read_item_ids(dataset: Dataset, domain: Domain) -> "pa.Array":
    """Reads the raw ids of a domain's items in the order of their rows, in the logs' type."""
    import pyarrow.parquet as pq

    path = dataset.local(domain.vocabulary)
    table = pq.read_table(path, columns=["item_id", "row"])
    return table.sort_by("row")["item_id"].combine_chunks()
