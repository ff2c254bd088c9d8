"""What the vocabularies of a dataset say of its items."""

import numpy as np
import pyarrow.parquet as pq


def item_counts(dataset):
    """Interactions of each row of M in the training part, int64 (num_embeddings,); 0 for rows kept for later items."""
    counts = np.zeros(dataset.num_embeddings, np.int64)
    for domain in dataset.domains:
        table = pq.read_table(dataset.local(domain.vocabulary), columns=["row", "count"])
        counts[table["row"].to_numpy()] = table["count"].to_numpy()
    return counts
