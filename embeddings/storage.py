"""The table on disk, readable at any number of ranks: one safetensors file a rank, each naming its rows.

Written beside TorchRec's own way (torch.distributed.checkpoint), whose metadata is a pickle and whose safetensors writer
copies every shard twice more (benchmarks/checkpoint.py).
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


class ShardCopy:
    """This rank's rows and their optimizer state as they are now, on the host: what is written while training goes on."""

    def __init__(self, table):
        first, tensors = table.shard()
        self.name = f"table-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        facts = {"first_stored_row": first, "rows": table.rows, "scatter_step": table.scatter.step, "updates": table.updates}
        self._facts = {key: str(value) for key, value in facts.items()}
        self._tensors = {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }

    def write(self, folder: Path):
        """Writes folder/table-<rank>-of-<ranks>.safetensors and returns its name."""
        save_file(self._tensors, folder / self.name, self._facts)
        return self.name


def load_shard(table, folder: Path, names: list[str] | None = None):
    """Fills this rank's rows, and the optimizer state that the table has, from the files of any number of ranks. Called on
    all ranks.

    names: of the files; None: all that a listing of the folder has. Raises ValueError where they
    are of another table or optimizer, or do not hold every row. """
    with table.rewritten() as (first, tensors):
        rows = len(tensors["weight"])
        filled = 0
        for file in table_paths(folder, names):
            with safe_open(file, framework="pt") as stored:
                facts = stored.metadata() or {}
                if (facts.get("rows"), facts.get("scatter_step")) != (str(table.rows), str(table.scatter.step)):
                    raise ValueError(f"{file}: holds a table of {facts.get('rows')} rows, this one has {table.rows}")
                if missing := tensors.keys() - stored.keys():
                    raise ValueError(f"{file}: lacks the optimizer's {', '.join(sorted(missing))}: it is of another optimizer")
                begin = int(facts["first_stored_row"])
                for name, tensor in tensors.items():
                    kept = stored.get_slice(name)
                    shape = kept.get_shape()
                    if shape[1:] != list(tensor.shape[1:]):
                        raise ValueError(f"{file}: {name} is {shape}, this table has rows of {list(tensor.shape[1:])}")
                    low, high = max(first, begin), min(first + rows, begin + shape[0])
                    if low < high:
                        tensor[low - first : high - first].copy_(kept[low - begin : high - begin])
                filled += max(0, high - low)
                table.updates = int(facts["updates"])
    if filled != rows:
        raise ValueError(f"{folder}: table files hold {filled} of the {rows} rows of rank {dist.get_rank()}")


def table_paths(folder: Path, names: list[str] | None = None) -> list[Path]:
    """The table's files in a folder: those of these names, or all that a listing has."""
    return sorted(folder.glob("table-*.safetensors")) if names is None else [folder / name for name in names]
