"""Each target's positions of the held-out item, as a Parquet file, which studies compare.

user      int64, the dataset's number
target    int64, the target's number (trainer/evaluation/targets.py): the user's where a user has one.
          Files of before do not have it
domain    int32, of the held-out item
sampled   int32, the 1-based position among drawn candidates
full      int32, the 1-based position among all items of the domain
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.files.atomic import replace_file

_SCHEMA = pa.schema(
    [
        ("user", pa.int64()),
        ("domain", pa.int32()),
        ("sampled", pa.int32()),
        ("full", pa.int32()),
        ("target", pa.int64()),
    ]
)


def write_ranks(
    file: Path,
    user_U: np.ndarray,
    domain_U: np.ndarray,
    sampled_U: np.ndarray,
    full_U: np.ndarray,
    target_U: np.ndarray | None = None,
) -> None:
    """Writes integers (U,); the file is there whole or not at all. target_U: None for the users'."""
    columns = []
    if target_U is None:
        target_U = user_U
    arrays = (user_U, domain_U, sampled_U, full_U, target_U)
    for column, values_U in zip(_SCHEMA, arrays, strict=True):
        columns.append(pa.array(values_U, column.type))
    with replace_file(file) as partial:
        pq.write_table(pa.table(columns, schema=_SCHEMA), partial)


def read_ranks(file: Path) -> dict[str, np.ndarray]:
    """The columns by name, int64 (U,)."""
    table = pq.read_table(file)
    columns = {}
    for name in _SCHEMA.names:
        stored = name if name in table.column_names else "user"
        columns[name] = table[stored].to_numpy().astype(np.int64)
    return columns
