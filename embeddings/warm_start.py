"""Warm start of the table: from a table on disk into one of other rows, at any number of ranks.

Rows that are found again come with their optimizer state; new rows begin like the rest of their
group.

Shapes: N rows of the table, F files, K rows that are asked for, W ranks, G groups, r width.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from embeddings.checkpoint import OpenFile, Ranges, check_names_and_shapes
from embeddings.placement import PIECE
from embeddings.row_scatter import RowScatter

if TYPE_CHECKING:
    from embeddings.table import ItemTable

_BLOCK = 1 << 18  # rows that are in memory at once
_FLOAT = 4


def carry_rows(
    table: "ItemTable",
    folder: Path,
    source_N: np.ndarray,
    group_N: np.ndarray,
    init_std: float,
    scale: float = 1.0,
    ranges: Ranges | None = None,
) -> None:
    """Fills this rank's rows from the files of any number of ranks in `folder`.

    Called on all ranks. Each row on disk is read by one rank, and sent to the rank that it is for.

    Args:
        table: the new table.
        folder: has the table files.
        source_N: integers, which row of the table on disk each row was, −1: none. It gets the
            vector and the optimizer's state.
        group_N: integers, to which group each row belongs, −1: to none, nobody has it. A row of a
            group that has no source begins at the mean of the group's others with their spread,
            coordinate by coordinate, and without a state; where a group has no others, of all.
        init_std: of the vectors that new rows are drawn with (the table's own), which are what is
            spread.
        scale: what every vector is multiplied by in the end; the optimizer's state, sums of squared
            gradients, by its square (Ash and Adams, 2020, "On Warm-Starting Neural Network
            Training": shrunk, they follow what is new as fresh ones do, and still know what they
            knew).
        ranges: as `load_shard` has them; None: the folder is listed.

    Raises ValueError where the files are of another width or optimizer, or do not hold every row
    that is asked for.

    Example: two domains as groups, six rows, of which the second of each group is new, and the last
    is nobody's:

        source_N    array([4, -1, 5, 0, -1, -1])
        group_N     array([0,  0, 0, 1,  1, -1])
    """
    first, tensors = table.local_rows()
    local_N = table.scatter.row(
        np.arange(first, first + len(tensors["weight"]))
    )
    source_N = np.asarray(source_N)[local_N].astype(np.int64)
    group_N = np.asarray(group_N)[local_N].astype(np.int64)
    table.fill(np.flatnonzero(source_N < 0))
    with table.rewritten() as (_, tensors):
        table.updates = _read(table, folder, tensors, source_N, ranges)
        start_new_rows(tensors["weight"], source_N, group_N, init_std)
        if scale != 1:
            for name, tensor in tensors.items():
                tensor.mul_(scale if name == "weight" else scale**2)


@dataclass(frozen=True)
class _DiskTable:
    """The table on disk.

    files, begin_F, end_F: its files and the stored rows of each, rising. scatter: how rows are
    stored. updates: how often its optimizer had stepped.
    """

    files: list[Path]
    begin_F: np.ndarray
    end_F: np.ndarray
    scatter: RowScatter
    updates: int

    def count_stored(self, stored_K: np.ndarray) -> int:
        """For how many of some stored rows there is a file."""
        if not self.files:
            return 0
        file_K = np.searchsorted(self.begin_F, stored_K, side="right") - 1
        is_stored_K = (file_K >= 0) & (stored_K < self.end_F[file_K])
        return int(np.count_nonzero(is_stored_K))


def _read(
    table: "ItemTable",
    folder: Path,
    tensors: dict[str, Tensor],
    source_N: np.ndarray,
    ranges: Ranges | None,
) -> int:
    """Fills the rows that have a source, empties the state of the others.

    Returns how often the optimizer had stepped.
    """
    disk = _read_headers(table, folder, tensors, ranges)
    index_K = np.flatnonzero(source_N >= 0)
    stored_K = np.zeros(0, np.int64)
    if disk.files:  # else there is no row to ask for
        stored_K = disk.scatter.stored(source_N[index_K])
    stored = disk.count_stored(stored_K)
    with _raise_on_all(folder):
        if stored != len(index_K):
            raise ValueError(
                f"{folder}: table files hold {stored} of the {len(index_K)} rows that rank "
                f"{dist.get_rank()} asks for"
            )
    new = torch.from_numpy(np.flatnonzero(source_N < 0))
    for name, tensor in tensors.items():
        if name != "weight":
            tensor[new.to(tensor.device)] = 0
    if disk.files:
        order = np.argsort(stored_K, kind="stable")
        _exchange_rows(folder, disk, tensors, stored_K[order], index_K[order])
    return disk.updates


def _exchange_rows(
    folder: Path,
    disk: _DiskTable,
    tensors: dict[str, Tensor],
    stored_K: np.ndarray,
    index_K: np.ndarray,
) -> None:
    """Round by round each rank reads the next of its stored rows and sends them to who wants them.

    stored_K, index_K: the stored rows that this rank wants, rising, and where in its shard they go.
    """
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    rows = disk.scatter.rows
    # As TorchRec shards: with as many ranks as files each reads one file.
    share = -(-rows // ranks)
    width = 0
    for tensor in tensors.values():
        width += max(1, tensor[:1].numel())
    step = max(1, min(_BLOCK, PIECE // (_FLOAT * width)))
    with contextlib.ExitStack() as stack:
        reader = _RowReader(disk, tensors, stack)
        for begin in range(0, share, step):
            end = min(begin + step, share)
            # Of each reader's rows in this round, those that are wanted here.
            wanted = []
            for reading_rank in range(ranks):
                first = reading_rank * share
                bounds = [min(first + begin, rows), min(first + end, rows)]
                wanted.append(slice(*np.searchsorted(stored_K, bounds)))
            wanted_counts = [part.stop - part.start for part in wanted]
            sent_counts = _exchange_counts(wanted_counts)
            wanted_rows = np.concatenate([stored_K[part] for part in wanted])
            wanted_index = np.concatenate([index_K[part] for part in wanted])
            requested = _exchange(
                torch.from_numpy(wanted_rows), wanted_counts, sent_counts
            )
            low = min(rank * share + begin, rows)
            high = min(rank * share + end, rows)
            values = {}
            with _raise_on_all(folder):
                values = reader.rows(requested.numpy(), low, high)
            index = torch.from_numpy(wanted_index)
            for name, tensor in tensors.items():
                received = _exchange(values[name], sent_counts, wanted_counts)
                tensor[index.to(tensor.device)] = received.to(tensor)


class _RowReader:
    """Reads stored rows. A file is opened once."""

    def __init__(
        self,
        disk: _DiskTable,
        tensors: dict[str, Tensor],
        stack: contextlib.ExitStack,
    ):
        self._disk = disk
        self._tensors = tensors
        self._stack = stack
        self._open_files: dict[Path, OpenFile] = {}

    def rows(
        self, stored_K: np.ndarray, low: int, high: int
    ) -> dict[str, Tensor]:
        """{name: the values of stored rows}.

        All of them are in low … high − 1, which are read once and in order.
        """
        values = {}
        for name, tensor in self._tensors.items():
            values[name] = torch.zeros(len(stored_K), *tensor.shape[1:])
        order = np.argsort(stored_K, kind="stable")
        disk = self._disk
        begins = disk.begin_F.tolist()
        ends = disk.end_F.tolist()
        for file, begin, end in zip(disk.files, begins, ends, strict=True):
            first = max(low, begin)
            last = min(high, end)
            bounds = np.searchsorted(stored_K, [first, last], sorter=order)
            part = order[slice(*bounds)]
            if not len(part):
                continue
            index = torch.from_numpy(part)
            in_file = torch.from_numpy(stored_K[part] - first)
            for name, value in values.items():
                stored = self._open(file).get_slice(name)
                block = stored[first - begin : last - begin]
                value[index] = block[in_file].to(value)
        return values

    def _open(self, file: Path) -> OpenFile:
        if file not in self._open_files:
            opened = safe_open(file, framework="pt")
            self._open_files[file] = self._stack.enter_context(opened)
        return self._open_files[file]


def _read_headers(
    table: "ItemTable",
    folder: Path,
    tensors: dict[str, Tensor],
    ranges: Ranges | None,
) -> _DiskTable:
    """What the headers of all files say, each read by one rank."""
    if ranges is None:
        files = sorted(folder.glob("table-*.safetensors"))
    else:
        files = [folder / name for name in sorted(ranges)]
    headers_F4 = torch.zeros(len(files), 4, dtype=torch.int64)
    with _raise_on_all(folder):
        for number in range(dist.get_rank(), len(files), dist.get_world_size()):
            headers_F4[number] = torch.tensor(
                _read_header(files[number], tensors)
            )
    dist.all_reduce(headers_F4)
    if not files:
        nothing = np.zeros(0, np.int64)
        return _DiskTable([], nothing, nothing, table.scatter, table.updates)
    numbers_F4 = headers_F4.numpy()
    order = np.argsort(numbers_F4[:, 0], kind="stable")
    begin_F, end_F, rows_F, updates_F = numbers_F4[order].T
    if (rows_F != rows_F[0]).any():
        raise ValueError(
            f"{folder}: its table files are of tables of {rows_F.min()} and of {rows_F.max()} rows"
        )
    return _DiskTable(
        files=[files[number] for number in order],
        begin_F=begin_F,
        end_F=end_F,
        scatter=RowScatter(int(rows_F[0])),
        updates=int(updates_F[0]),
    )


def _read_header(file: Path, tensors: dict[str, Tensor]) -> list[int]:
    """A file's stored rows, from and to, the table's number of rows, and its updates."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        scatter = RowScatter(int(metadata["rows"]))
        if metadata["scatter_step"] != str(scatter.step):
            raise ValueError(
                f"{file}: holds its rows in another order than this program's"
            )
        check_names_and_shapes(file, stored, tensors)
        begin = int(metadata["first_stored_row"])
        end = begin + stored.get_slice("weight").get_shape()[0]
        return [begin, end, scatter.rows, int(metadata["updates"])]


def _exchange_counts(counts_W: list[int]) -> list[int]:
    """Sends each rank its number; the numbers that came from them."""
    received = torch.empty(len(counts_W), dtype=torch.int64)
    dist.all_to_all_single(received, torch.tensor(counts_W))
    return received.tolist()


def _exchange(
    values: Tensor, sent_W: list[int], received_W: list[int]
) -> Tensor:
    """The first sent_W[0] values go to rank 0, and so on.

    received_W: how many come from each rank.
    """
    received = values.new_empty(sum(received_W), *values.shape[1:])
    dist.all_to_all_single(received, values, received_W, sent_W)
    return received


@contextlib.contextmanager
def _raise_on_all(folder: Path) -> Iterator[None]:
    """Called on all ranks: what one rank raises within it all raise, so that none waits for it."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = torch.tensor([error is not None], dtype=torch.int32)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed:
        raise ValueError(
            f"{folder}: another rank cannot read its rows; its own line says why"
        )


def start_new_rows(
    weight: Tensor, source_N: np.ndarray, group_N: np.ndarray, init_std: float
) -> None:
    """Gives rows without a source their first vectors: cold start from their group's others.

    weight: this rank's vectors, those of new rows drawn with init_std. Called on all ranks.
    """
    grouped = np.flatnonzero(group_N >= 0)
    is_new = source_N[grouped] < 0
    new = grouped[is_new]
    moments = _compute_moments(weight, grouped[~is_new], group_N)
    if moments is None:
        return
    mean_GR, spread_GR = moments
    for low in range(0, len(new), _BLOCK):
        rows = new[low : low + _BLOCK]
        index = torch.from_numpy(rows).to(weight.device)
        group = torch.from_numpy(group_N[rows])
        drawn = weight[index].double().cpu() / init_std
        weight[index] = (mean_GR[group] + drawn * spread_GR[group]).to(weight)


def _compute_moments(
    weight: Tensor, carried: np.ndarray, group_N: np.ndarray
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each group's carried rows over all ranks, float64 (G, r).

    A group without any has those of all; None where nothing was carried at all.
    """
    width = weight.shape[1]
    groups = torch.tensor([int(group_N.max(initial=-1)) + 1])
    dist.all_reduce(groups, op=dist.ReduceOp.MAX)
    sums = torch.zeros(int(groups), 1 + 2 * width, dtype=torch.float64)
    for low in range(0, len(carried), _BLOCK):
        rows = carried[low : low + _BLOCK]
        index = torch.from_numpy(rows).to(weight.device)
        vectors = weight[index].double().cpu()
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        terms = torch.cat([ones, vectors, vectors.square()], dim=1)
        sums.index_add_(0, torch.from_numpy(group_N[rows]), terms)
    dist.all_reduce(sums)
    sums = torch.where(sums[:, :1] > 0, sums, sums.sum(0))
    if not sums[:, 0].all():
        return None
    mean_GR, square_GR = (sums[:, 1:] / sums[:, :1]).split(width, dim=1)
    spread_GR = (square_GR - mean_GR.square()).clamp(min=0).sqrt()
    return mean_GR, spread_GR
