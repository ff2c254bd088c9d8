"""A table on disk into a table of other rows, at any number of ranks: what is left of it, and what is new.

Shapes: N rows of the table, G groups, r width.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from embeddings.checkpoint import Ranges, check_names_and_shapes
from embeddings.placement import PIECE
from embeddings.row_scatter import RowScatter

_BLOCK = 1 << 18  # rows that are held at once


def carry_rows(
    table,
    folder: Path,
    source_N,
    group_N,
    init_std,
    kept=1.0,
    ranges: Ranges | None = None,
):
    """Fills this rank's rows from the files of any number of ranks in `folder`. Called on all ranks.

    source_N: which row of the table on disk each row was, −1: none; it gets the vector and the optimizer's state. group_N: to
    which group each row belongs, −1: to none, nobody has it. A row of a group that was none begins at the mean of the group's
    others with their spread, coordinate by coordinate, and without a state; where a group has no others, of all. Integers (N,).
    init_std: of the vectors that new rows are drawn with (the table's own), which are what is spread. kept: what every vector
    is multiplied by in the end; the optimizer's state, sums of squared gradients, by its square (Ash and Adams, 2020, "On
    Warm-Starting Neural Network Training": shrunk, they follow what is new as fresh ones do, and still know what they knew).

    ranges: as `load_shard` has them; None: the folder is listed.
    Each row on disk is read by one rank, and sent to the rank that it is for.
    Raises ValueError where the files are of another width or optimizer, or do not hold every row that is asked for.
    """
    first, tensors = table.shard()
    own_N = table.scatter.row(np.arange(first, first + len(tensors["weight"])))
    source_N = np.asarray(source_N)[own_N].astype(np.int64)
    group_N = np.asarray(group_N)[own_N].astype(np.int64)
    table.fill(np.flatnonzero(source_N < 0))
    with table.rewritten() as (_, tensors):
        table.updates = _read(table, folder, tensors, source_N, ranges)
        _begin(tensors["weight"], source_N, group_N, init_std)
        if kept != 1:
            for name, tensor in tensors.items():
                tensor.mul_(kept if name == "weight" else kept**2)


@dataclass(frozen=True)
class _Stored:
    """The table on disk. files, begin_F, end_F: its files and the stored rows of each, rising. scatter: how rows are stored."""

    files: list[Path]
    begin_F: np.ndarray
    end_F: np.ndarray
    scatter: RowScatter
    updates: int

    def holds(self, stored_K):
        """Whether there is a file with each of some stored rows."""
        file_K = np.searchsorted(self.begin_F, stored_K, side="right") - 1
        return (file_K >= 0) & (stored_K < self.end_F[file_K])


def _read(table, folder, tensors, source_N, ranges):
    """Fills the rows that were there, empties the state of the others; how often the optimizer had stepped."""
    disk = _look_into(table, folder, tensors, ranges)
    place_K = np.flatnonzero(source_N >= 0)
    # Without files there is no row to ask for.
    stored_K = (
        disk.scatter.stored(source_N[place_K]) if disk.files else np.zeros(0, np.int64)
    )
    held = int(np.count_nonzero(disk.holds(stored_K))) if disk.files else 0
    with _agreed(folder):
        if held != len(place_K):
            raise ValueError(
                f"{folder}: table files hold {held} of the {len(place_K)} rows that rank {dist.get_rank()} asks for"
            )
    state = [tensor for name, tensor in tensors.items() if name != "weight"]
    new = torch.from_numpy(np.flatnonzero(source_N < 0))
    for tensor in state:
        tensor[new.to(tensor.device)] = 0
    if disk.files:
        order = np.argsort(stored_K, kind="stable")
        _exchange_rows(folder, disk, tensors, stored_K[order], place_K[order])
    return disk.updates


def _exchange_rows(folder, disk, tensors, stored_K, place_K):
    """Round by round each rank reads the next of its stored rows and sends those that are asked for to who asks.

    stored_K, place_K: what this rank asks for, rising, and where in its shard it goes.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = disk.scatter.rows
    share = -(
        -rows // ranks
    )  # as TorchRec shards: with as many ranks as files each reads one file
    width = {name: max(1, tensor[:1].numel()) for name, tensor in tensors.items()}
    step = max(1, min(_BLOCK, PIECE // (4 * sum(width.values()))))
    with contextlib.ExitStack() as stack:
        reader = _Reader(disk, tensors, stack)
        for begin in range(0, share, step):
            end = min(begin + step, share)
            # Of each reader's rows in this round, those that are wanted here.
            bounds = [
                [min(owner * share + at, rows) for at in (begin, end)]
                for owner in range(ranks)
            ]
            wanted = [slice(*np.searchsorted(stored_K, bound)) for bound in bounds]
            asked_W = [part.stop - part.start for part in wanted]
            told_W = _exchanged_counts(asked_W)
            own = torch.from_numpy(np.concatenate([stored_K[part] for part in wanted]))
            requested = _exchanged(own, asked_W, told_W)
            place = torch.from_numpy(np.concatenate([place_K[part] for part in wanted]))
            low = min(rank * share + begin, rows)
            high = min(rank * share + end, rows)
            values = {}
            with _agreed(folder):
                values = reader.rows(requested.numpy(), low, high)
            for name, tensor in tensors.items():
                received = _exchanged(values[name], told_W, asked_W)
                tensor[place.to(tensor.device)] = received.to(tensor)


class _Reader:
    """Reads stored rows. A file is opened once."""

    def __init__(self, disk: _Stored, tensors, stack: contextlib.ExitStack):
        self._disk, self._tensors, self._stack = disk, tensors, stack
        self._open = {}

    def rows(self, stored_K, low, high):
        """{name: the values of stored rows}, all of them in low … high − 1, which are read once and in order."""
        values = {
            name: torch.zeros(len(stored_K), *tensor.shape[1:])
            for name, tensor in self._tensors.items()
        }
        order = np.argsort(stored_K, kind="stable")
        disk = self._disk
        for file, begin, end in zip(
            disk.files, disk.begin_F.tolist(), disk.end_F.tolist(), strict=True
        ):
            first, last = max(low, begin), min(high, end)
            part = order[slice(*np.searchsorted(stored_K, [first, last], sorter=order))]
            if not len(part):
                continue
            for name, value in values.items():
                rows = self._opened(file).get_slice(name)[first - begin : last - begin]
                value[torch.from_numpy(part)] = rows[
                    torch.from_numpy(stored_K[part] - first)
                ].to(value)
        return values

    def _opened(self, file):
        if file not in self._open:
            self._open[file] = self._stack.enter_context(
                safe_open(file, framework="pt")
            )
        return self._open[file]


def _look_into(table, folder, tensors, ranges):
    """What the headers of all files say, each read by one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    files = (
        sorted(folder.glob("table-*.safetensors"))
        if ranges is None
        else [folder / name for name in sorted(ranges)]
    )
    facts_FK = torch.zeros(len(files), 4, dtype=torch.int64)
    with _agreed(folder):
        for number in range(rank, len(files), ranks):
            with safe_open(files[number], framework="pt") as stored:
                facts = stored.metadata() or {}
                scatter = RowScatter(int(facts["rows"]))
                if facts["scatter_step"] != str(scatter.step):
                    raise ValueError(
                        f"{files[number]}: holds its rows in another order than this program's"
                    )
                check_names_and_shapes(files[number], stored, tensors)
                begin = int(facts["first_stored_row"])
                end = begin + stored.get_slice("weight").get_shape()[0]
                facts_FK[number] = torch.tensor(
                    [begin, end, scatter.rows, int(facts["updates"])]
                )
    dist.all_reduce(facts_FK)
    if not files:
        return _Stored(
            [],
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            table.scatter,
            table.updates,
        )
    facts_FK = facts_FK.numpy()
    order = np.argsort(facts_FK[:, 0], kind="stable")
    begin_F, end_F, rows_F, updates_F = facts_FK[order].T
    if (rows_F != rows_F[0]).any():
        raise ValueError(
            f"{folder}: its table files are of tables of {rows_F.min()} and of {rows_F.max()} rows"
        )
    return _Stored(
        [files[number] for number in order],
        begin_F,
        end_F,
        RowScatter(int(rows_F[0])),
        int(updates_F[0]),
    )


def _exchanged_counts(counts_W):
    """What each rank told this one."""
    told = torch.empty(len(counts_W), dtype=torch.int64)
    dist.all_to_all_single(told, torch.tensor(counts_W))
    return told.tolist()


def _exchanged(values, sent_W, received_W):
    """The first sent_W[0] values go to rank 0, and so on; received_W: how many come from each rank."""
    received = values.new_empty(sum(received_W), *values.shape[1:])
    dist.all_to_all_single(received, values, received_W, sent_W)
    return received


@contextlib.contextmanager
def _agreed(folder):
    """Called on all ranks: what is raised within it on one rank is raised on all, so that none waits for it."""
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


def _begin(weight, source_N, group_N, init_std):
    """Gives rows that were none their first vectors."""
    width = weight.shape[1]
    groups = torch.tensor([int(group_N.max(initial=-1)) + 1])
    dist.all_reduce(groups, op=dist.ReduceOp.MAX)
    grouped = np.flatnonzero(group_N >= 0)
    carried, new = grouped[source_N[grouped] >= 0], grouped[source_N[grouped] < 0]
    sums = torch.zeros(int(groups), 1 + 2 * width, dtype=torch.float64)
    for low in range(0, len(carried), _BLOCK):
        part = carried[low : low + _BLOCK]
        vectors = weight[torch.from_numpy(part).to(weight.device)].double().cpu()
        facts = torch.cat(
            [torch.ones(len(part), 1, dtype=torch.float64), vectors, vectors.square()],
            dim=1,
        )
        sums.index_add_(0, torch.from_numpy(group_N[part]), facts)
    dist.all_reduce(sums)
    sums = torch.where(sums[:, :1] > 0, sums, sums.sum(0))
    if not sums[:, 0].all():  # nothing was carried at all
        return
    mean_GR, square_GR = (sums[:, 1:] / sums[:, :1]).split(width, dim=1)
    spread_GR = (square_GR - mean_GR.square()).clamp(min=0).sqrt()
    for low in range(0, len(new), _BLOCK):
        part = torch.from_numpy(new[low : low + _BLOCK]).to(weight.device)
        group = torch.from_numpy(group_N[new[low : low + _BLOCK]])
        drawn = weight[part].double().cpu() / init_std
        weight[part] = (mean_GR[group] + drawn * spread_GR[group]).to(weight)
