"""Each user's ranks of the held-out item, as a file: what an evaluation among all items leaves, and what studies compare.

user (int64, the dataset's number), domain (int32, of the held-out item), sampled, full (int32): its 1-based ranks among drawn
candidates and among all items of the domain.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.files.atomic import replaced

_COLUMNS = {
    "user": pa.int64(),
    "domain": pa.int32(),
    "sampled": pa.int32(),
    "full": pa.int32(),
}


def write_ranks(file: Path, user_U, domain_U, sampled_U, full_U):
    """Arrays of integers; the file is there whole or not at all."""
    values = zip(_COLUMNS.items(), (user_U, domain_U, sampled_U, full_U), strict=True)
    with replaced(file) as partial:
        pq.write_table(
            pa.table({name: pa.array(column, kind) for (name, kind), column in values}),
            partial,
        )


def read_ranks(file: Path) -> dict[str, np.ndarray]:
    """The columns by name, int64 (U,)."""
    table = pq.read_table(file, columns=list(_COLUMNS))
    return {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
