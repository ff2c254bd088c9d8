"""The table on disk, readable at any number of ranks (resharding): one safetensors file a rank.

    table-00000-of-00002.safetensors     the tensors of a shard by name, and as metadata
    table-00001-of-00002.safetensors     first_stored_row, rows, scatter_step, updates

Written beside TorchRec's own way (torch.distributed.checkpoint), whose metadata is a pickle and
whose safetensors writer copies every shard twice more (benchmarks/checkpoint.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from embeddings.host_memory import unforked_zeros
from embeddings.placement import PIECE

if TYPE_CHECKING:
    from embeddings.table import ItemTable

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
# Of table files by name: the first stored row and how many rows; None where that is not known.
Ranges = dict[str, tuple[int, int] | None]
# An open safetensors file.
OpenFile = Any


class ShardCopy:
    """A copy of this rank's rows and their optimizer state, on the host, to be written in background.

    copied: False where the host has no room for a copy (`Capacity.copied`). Then `write` takes them
    from the table, which must not be updated before it is done.
    """

    def __init__(self, table: "ItemTable"):
        first, tensors = table.shard()
        rank = dist.get_rank()
        ranks = dist.get_world_size()
        self.name = f"table-{rank:05d}-of-{ranks:05d}.safetensors"
        self.range = {"first_row": first, "rows": len(tensors["weight"])}
        self._metadata = {
            "first_stored_row": str(first),
            "rows": str(table.rows),
            "scatter_step": str(table.scatter.step),
            "updates": str(table.updates),
        }
        self.copied = table.capacity.copied
        self._tensors = tensors
        if self.copied:
            self._tensors = {}
            for name, tensor in tensors.items():
                self._tensors[name] = _copy_to_host(tensor)

    def write(self, folder: Path) -> str:
        """Writes folder/table-<rank>-of-<ranks>.safetensors and returns its name.

        Takes memory for a piece of the rows at most.
        """
        _write_safetensors(folder / self.name, self._tensors, self._metadata)
        return self.name


def load_shard(
    table: "ItemTable", folder: Path, ranges: Ranges | None = None
) -> None:
    """Fills this rank's rows, and the optimizer state that the table has. Called on all ranks.

    The files may be those of any number of ranks.

    ranges: of all table files of the folder, of which those alone are opened that may hold rows of
    this rank. None: of all that a listing has, and each is looked into.
    Raises ValueError where they are of another table or optimizer, or do not hold every row.
    """
    with table.rewritten() as (first, tensors):
        rows = len(tensors["weight"])
        filled = 0
        for file in find_table_files(folder, ranges, first, first + rows):
            with safe_open(file, framework="pt") as stored:
                filled += _read_rows(table, file, stored, first, tensors)
        if filled != rows:
            raise ValueError(
                f"{folder}: table files hold {filled} of the {rows} rows of rank {dist.get_rank()}"
            )


def _read_rows(
    table: "ItemTable",
    file: Path,
    stored: OpenFile,
    first: int,
    tensors: dict[str, torch.Tensor],
) -> int:
    """Fills the rows of a shard that an open file has; how many these are.

    first: the shard's first stored row.
    """
    metadata = stored.metadata() or {}
    rows = metadata.get("rows")
    step = metadata.get("scatter_step")
    if rows != str(table.rows) or step != str(table.scatter.step):
        raise ValueError(
            f"{file}: holds a table of {rows} rows, this one has {table.rows}"
        )
    check_names_and_shapes(file, stored, tensors)
    begin = int(metadata["first_stored_row"])
    end = begin + stored.get_slice("weight").get_shape()[0]
    low = max(first, begin)
    high = min(first + len(tensors["weight"]), end)
    to_file = first - begin  # from a shard's row to a file's
    for name, tensor in tensors.items():
        values = stored.get_slice(name)
        for piece_begin, piece_end in pieces(tensor, low - first, high - first):
            piece = values[piece_begin + to_file : piece_end + to_file]
            tensor[piece_begin:piece_end].copy_(piece)
    table.updates = int(metadata["updates"])
    return max(0, high - low)


def check_names_and_shapes(
    file: Path, stored: OpenFile, tensors: dict[str, torch.Tensor]
) -> None:
    """Raises ValueError where an open file lacks a shard's tensor, or has it in another shape."""
    missing = tensors.keys() - stored.keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(
            f"{file}: lacks the optimizer's {names}: it is of another optimizer"
        )
    for name, tensor in tensors.items():
        shape = stored.get_slice(name).get_shape()
        expected = list(tensor.shape[1:])
        if shape[1:] != expected:
            raise ValueError(
                f"{file}: {name} is {shape}, this table has rows of {expected}"
            )


def pieces(
    tensor: torch.Tensor, low: int, high: int
) -> Iterator[tuple[int, int]]:
    """Cuts the rows low … high − 1 of a tensor like this one into pieces: (begin, end).

    A piece has `PIECE` bytes at most.
    """
    row = max(1, tensor[:1].numel() * tensor.element_size())
    step = max(1, PIECE // row)
    for begin in range(low, high, step):
        yield begin, min(begin + step, high)


def find_table_files(
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


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = unforked_zeros(*tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _write_safetensors(
    file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """By hand: safetensors' own writer wants all tensors on the host as a whole."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for begin, end in pieces(tensor, 0, len(tensor)):
                part = tensor[begin:end].detach().cpu().contiguous()
                values = part.view(torch.uint8).numpy()
                target.write(memoryview(values))  # type: ignore[arg-type]  # no Buffer in NumPy's types
