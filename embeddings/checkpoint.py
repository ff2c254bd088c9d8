"""The table on disk, readable at any number of ranks: one safetensors file a rank, each naming its rows.

Written beside TorchRec's own way (torch.distributed.checkpoint), whose metadata is a pickle and whose safetensors writer
copies every shard twice more (benchmarks/checkpoint.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from embeddings.host_memory import unforked_zeros
from embeddings.placement import PIECE

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
# Of table files by name: the first stored row and how many rows; None where that is not known.
Ranges = dict[str, tuple[int, int] | None]


class ShardCopy:
    """This rank's rows and their optimizer state as they are now, on the host: what is written while training goes on.

    copied: False where the host has no room for a copy (`Capacity.copied`). Then `write` takes them from the table, which must
    not be updated before it is done.
    """

    def __init__(self, table):
        first, tensors = table.shard()
        self.name = (
            f"table-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        )
        self.range = {"first_row": first, "rows": len(tensors["weight"])}
        facts = {
            "first_stored_row": first,
            "rows": table.rows,
            "scatter_step": table.scatter.step,
            "updates": table.updates,
        }
        self._facts = {key: str(value) for key, value in facts.items()}
        self.copied = table.capacity.copied
        self._tensors = (
            {name: _on_host(tensor) for name, tensor in tensors.items()}
            if self.copied
            else tensors
        )

    def write(self, folder: Path):
        """Writes folder/table-<rank>-of-<ranks>.safetensors and returns its name. Holds a piece of the rows besides at most."""
        _write_safetensors(folder / self.name, self._tensors, self._facts)
        return self.name


def load_shard(table, folder: Path, ranges: Ranges | None = None):
    """Fills this rank's rows, and the optimizer state that the table has, from the files of any number of ranks. Called on
    all ranks.

    ranges: of all table files of the folder, of which those alone are opened that may hold rows of this rank; None: of all
    that a listing has, and each is looked into.
    Raises ValueError where they are of another table or optimizer, or do not hold every row.
    """
    with table.rewritten() as (first, tensors):
        rows = len(tensors["weight"])
        filled = 0
        for file in files_with(folder, ranges, first, first + rows):
            with safe_open(file, framework="pt") as stored:
                facts = stored.metadata() or {}
                if (facts.get("rows"), facts.get("scatter_step")) != (
                    str(table.rows),
                    str(table.scatter.step),
                ):
                    raise ValueError(
                        f"{file}: holds a table of {facts.get('rows')} rows, this one has {table.rows}"
                    )
                check_names_and_shapes(file, stored, tensors)
                begin = int(facts["first_stored_row"])
                low = max(first, begin)
                high = min(
                    first + rows, begin + stored.get_slice("weight").get_shape()[0]
                )
                for name, tensor in tensors.items():
                    kept = stored.get_slice(name)
                    for place, end in pieces(tensor, low - first, high - first):
                        tensor[place:end].copy_(
                            kept[place + first - begin : end + first - begin]
                        )
                filled += max(0, high - low)
                table.updates = int(facts["updates"])
        if filled != rows:
            raise ValueError(
                f"{folder}: table files hold {filled} of the {rows} rows of rank {dist.get_rank()}"
            )


def check_names_and_shapes(file, stored, tensors):
    """Raises ValueError where an open file lacks one of a shard's tensors, or has it in another shape."""
    if missing := tensors.keys() - stored.keys():
        raise ValueError(
            f"{file}: lacks the optimizer's {', '.join(sorted(missing))}: it is of another optimizer"
        )
    for name, tensor in tensors.items():
        shape = stored.get_slice(name).get_shape()
        if shape[1:] != list(tensor.shape[1:]):
            raise ValueError(
                f"{file}: {name} is {shape}, this table has rows of {list(tensor.shape[1:])}"
            )


def pieces(tensor: torch.Tensor, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Cuts the rows low … high − 1 of a tensor like this one into pieces of at most `PIECE` bytes: (begin, end)."""
    row = max(1, tensor[:1].numel() * tensor.element_size())
    step = max(1, PIECE // row)
    for begin in range(low, high, step):
        yield begin, min(begin + step, high)


def files_with(
    folder: Path, ranges: Ranges | None, first: int, last: int
) -> list[Path]:
    """The table files that may hold stored rows first … last − 1."""
    if ranges is None:
        return sorted(folder.glob("table-*.safetensors"))
    files = []
    for name, rows in sorted(ranges.items()):
        if rows is None or (rows[0] < last and first < rows[0] + rows[1]):
            files.append(folder / name)
    return files


def _on_host(tensor):
    copy = unforked_zeros(*tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _write_safetensors(file, tensors, facts):
    """By hand: safetensors' own writer wants all tensors on the host as a whole."""
    header = {"__metadata__": facts}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for begin, end in pieces(tensor, 0, len(tensor)):
                part = tensor[begin:end].detach().cpu().contiguous()
                target.write(memoryview(part.view(torch.uint8).numpy()))
