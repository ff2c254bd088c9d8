"""Each target's positions of the held-out item, as a Parquet file, which studies compare.

user      int64, the dataset's number
target    int64, the target's number (trainer/evaluation/targets.py): the user's where a user has one.
          Files of before do not have it
domain    int32, of the held-out item
sampled   int32, the 1-based position among drawn candidates
full      int32, the 1-based position among all items of the domain
seen      bool, whether training has seen the item; of others nothing counts
sampled_with_recency, full_with_recency    int32, by the model with its recency term; 0 without one

Files of before have the first four alone. Then `target` is the user, all is seen, and no term is known.
"""

from dataclasses import dataclass, fields
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
        ("seen", pa.bool_()),
        ("sampled_with_recency", pa.int32()),
        ("full_with_recency", pa.int32()),
    ]
)


@dataclass(frozen=True)
class UserRanks:
    """The columns, (U,) each. None: what a file of before would say."""

    user: np.ndarray
    domain: np.ndarray
    sampled: np.ndarray
    full: np.ndarray
    target: np.ndarray | None = None
    seen: np.ndarray | None = None
    sampled_with_recency: np.ndarray | None = None
    full_with_recency: np.ndarray | None = None

    def filled(self) -> dict[str, np.ndarray]:
        """All columns by name."""
        nothing = np.zeros(len(self.user), np.int64)
        unsaid = {
            "target": self.user,
            "seen": nothing == 0,
            "sampled_with_recency": nothing,
            "full_with_recency": nothing,
        }
        columns = {}
        for field in fields(self):
            values_U = getattr(self, field.name)
            if values_U is None:
                values_U = unsaid[field.name]
            columns[field.name] = values_U
        return columns


def write_ranks(file: Path, ranks: UserRanks) -> None:
    """Writes the columns; the file is there whole or not at all."""
    columns = []
    filled = ranks.filled()
    for column in _SCHEMA:
        columns.append(pa.array(filled[column.name], column.type))
    with replace_file(file) as partial:
        pq.write_table(pa.table(columns, schema=_SCHEMA), partial)


def read_ranks(file: Path) -> dict[str, np.ndarray]:
    """The columns by name, int64 (U,), of the targets whose item training has seen."""
    table = pq.read_table(file)
    columns = {}
    for name in table.column_names:
        if name in _SCHEMA.names:
            columns[name] = table[name].to_numpy().astype(np.int64)
    filled = UserRanks(**columns).filled()
    seen_U = filled.pop("seen").astype(bool)
    return {name: values_U[seen_U] for name, values_U in filled.items()}
