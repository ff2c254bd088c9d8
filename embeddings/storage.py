"""The table's rows on disk, readable at any number of ranks: one safetensors file a rank, each naming its rows."""

from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


def save_shard(table, folder: Path):
    """Writes this rank's rows to folder/table-<rank>-of-<ranks>.safetensors. Called on all ranks."""
    first, weights = table.shard()
    name = f"table-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    facts = {"first_stored_row": first, "rows": table.rows, "scatter_step": table.scatter.step}
    save_file({"weight": weights.contiguous()}, folder / name, {key: str(value) for key, value in facts.items()})


def load_shard(table, folder: Path):
    """Fills this rank's rows from the files of any number of ranks. Called on all ranks.

    Raises ValueError where they are of another table, or do not hold every row.
    """
    first, weights = table.shard()
    filled = 0
    for file in sorted(folder.glob("table-*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata()
            if (int(facts["rows"]), int(facts["scatter_step"])) != (table.rows, table.scatter.step):
                raise ValueError(f"{file}: holds a table of {facts['rows']} rows, this one has {table.rows}")
            rows = stored.get_slice("weight")
            begin = int(facts["first_stored_row"])
            low, high = max(first, begin), min(first + len(weights), begin + rows.get_shape()[0])
            if low < high:
                weights[low - first : high - first] = rows[low - begin : high - begin].to(weights)
                filled += high - low
    if filled != len(weights):
        raise ValueError(f"{folder}: table files hold {filled} of the {len(weights)} rows of rank {dist.get_rank()}")
