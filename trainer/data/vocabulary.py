"""What the vocabularies of a dataset say of its items."""

import numpy as np


def item_counts(dataset):
    """Interactions of each row of M in the training part, int64 (num_embeddings,); 0 for rows kept for later items."""
    import pyarrow.parquet as pq  # not for the settings, which are imported with this module

    counts = np.zeros(dataset.num_embeddings, np.int64)
    for domain in dataset.domains:
        table = pq.read_table(dataset.local(domain.vocabulary), columns=["row", "count"])
        counts[table["row"].to_numpy()] = table["count"].to_numpy()
    return counts


def item_ids(dataset, domain):
    """The raw ids of a Domain's items in the order of their rows, of the type that they came with: a pyarrow array."""
    import pyarrow.parquet as pq

    columns = pq.read_table(dataset.local(domain.vocabulary), columns=["item_id", "row"])
    return columns.sort_by("row")["item_id"].combine_chunks()
