"""What a rank scores: its rows of a domain in strips, for some of the users.

A strip's vectors are copied together, since they lie far apart in the shard, in the form that a scan
wants: embeddings/topk/torch_scan.py or cpu_scan.py.

Shapes: U users of a part, S rows of a strip, E excluded pairs of user and row, P pairs, r width. A
slot is a row's index in the shard's weight.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from embeddings.topk.bounds import Vectors, exact_scores, full_precision

if TYPE_CHECKING:
    from embeddings.table import ItemTable

_STRIP = 8  # blocks
_FEWEST = 128  # users that are worth a thread


class Shard:
    """The rows of M that this rank has, with the vectors that they have now."""

    def __init__(self, table: "ItemTable"):
        self.first, tensors = table.shard()
        self.weight = tensors["weight"].detach()
        self.scatter = table.scatter

    def slot(self, row: Tensor) -> Tensor:
        """Where in `weight` rows of M would be."""
        return self.scatter.stored(row) - self.first

    def row(self, slot: Tensor) -> Tensor:
        """The inverse of `slot`."""
        return self.scatter.row(slot + self.first)

    def contains(self, slot: Tensor) -> Tensor:
        """Whether slots are this shard's, bool."""
        return (slot >= 0) & (slot < len(self.weight))


@dataclass(frozen=True)
class Strip:
    """Some rows of a shard.

    Attributes:
        number: which of the strips it is.
        row_S: rows of M, ascending.
        slot_S: their slots in the shard.
        items: their vectors, as the scan wants them.
        blocks: in how many blocks to score it.

    Example: the rows 8 to 15 of M, every other one in this rank's shard:

        row_S     tensor([8, 10, 12, 14])
        slot_S    tensor([4, 5, 6, 7])
    """

    number: int
    row_S: Tensor
    slot_S: Tensor
    items: Any
    blocks: int


class Strips:
    """The rows [first, first + items) of M in strips.

    About `block` · 8 rows of a strip lie on each of `ranks` ranks.
    """

    def __init__(
        self,
        first: int,
        items: int,
        block: int,
        ranks: int,
        ranked_N: Tensor | None = None,
    ):
        """ranked_N: bool (items,), those that are in strips; None: all."""
        self.block = block
        self._first = first
        self._ranked_N = ranked_N
        span = _STRIP * block * ranks
        self.bounds = [*range(first, first + items, span), first + items]

    def cut(
        self,
        shard: Shard,
        pack_items: Callable[[Tensor, Tensor], Any],
    ) -> Iterator[Strip]:
        """The strips that the shard has any rows of, in the order of rows.

        pack_items(weight, slot_S): the vectors as the scan wants them.
        """
        for number, (begin, end) in enumerate(pairwise(self.bounds)):
            row = torch.arange(begin, end, device=shard.weight.device)
            slot = shard.slot(row)
            local = shard.contains(slot)
            if self._ranked_N is not None:
                begin_N = begin - self._first
                local &= self._ranked_N[begin_N : begin_N + len(row)]
            row = row[local]
            slot = slot[local]
            if len(row) == 0:
                continue
            # As many as there would be of `block` rows: how many rows of a strip are on this rank
            # differs by a few.
            blocks = max(1, round(len(row) / self.block))
            yield Strip(
                number,
                row,
                slot,
                pack_items(shard.weight, slot),
                blocks,
            )


class UserPart:
    """Some users y_UR, and what of each is excluded: pairs (row, user), sorted by row, once each.

    Example: three users. The first is not to be shown rows 4 and 9, the third not row 4:

        excluded_row     tensor([4, 4, 9])
        excluded_user    tensor([0, 2, 0])
    """

    def __init__(
        self,
        y_UR: Tensor,
        excluded_row: Tensor,
        excluded_user: Tensor,
        shard: Shard,
        strips: Strips,
    ):
        self.y = Vectors(y_UR)
        self.shard = shard
        self.excluded_row = excluded_row
        self.excluded_user = excluded_user
        bounds = torch.tensor(strips.bounds, device=y_UR.device)
        self._cuts = torch.searchsorted(excluded_row, bounds).tolist()

    def exact(self, user_P: Tensor, slot_P: Tensor) -> Tensor:
        """The scores of pairs of user and slot, (P,)."""
        return exact_scores(
            self.y.vectors_VR,
            user_P,
            self.shard.weight,
            slot_P,
        )

    def find_excluded(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """Excluded pairs (user, column of the strip), by column.

        Example: the pairs of the class's example, in a strip of rows 4, 6, 8 and 9:

            users      tensor([0, 2, 0])
            columns    tensor([0, 0, 3])
        """
        begin = self._cuts[strip.number]
        end = self._cuts[strip.number + 1]
        columns = torch.searchsorted(strip.row_S, self.excluded_row[begin:end])
        return self.excluded_user[begin:end], columns

    def count_shown(self, items: int) -> Tensor:
        """How many of all the shard's items, so many, are shown to each user (U,)."""
        users = len(self.y.vectors_VR)
        return items - torch.bincount(self.excluded_user, minlength=users)


class Scan(Protocol):
    """What goes through the strips for a part of the users: the best k, or the items ahead."""

    part: UserPart

    def scan(self, strip: Strip) -> None:
        """Takes in a strip."""


def split_users(users: int, device: torch.device, most: int) -> list[slice]:
    """Slices of so many users that are scored side by side.

    On a CPU up to `most` for each thread, where users are enough.
    """
    parts = 1
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads > 1:
        parts = max(1, min(threads * most, users // _FEWEST))
    slices = []
    for part in range(parts):
        begin = users * part // parts
        end = users * (part + 1) // parts
        slices.append(slice(begin, end))
    return slices


def scan_strips(strips: Iterator[Strip], scans: Sequence[Scan]) -> None:
    """Calls each scan with every strip, in order; the scans run side by side.

    What is done beside the products is many short operations, which PyTorch's threads do not speed
    up: so each scan has a core for itself.
    """
    with full_precision(scans[0].part.shard.weight.device.type):
        if len(scans) == 1:
            with torch.no_grad():
                for strip in strips:
                    scans[0].scan(strip)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(threads, len(scans)) + 1) as pool:
                _scan_side_by_side(pool, strips, scans)
        finally:
            torch.set_num_threads(threads)


def _scan_side_by_side(
    pool: ThreadPoolExecutor,
    strips: Iterator[Strip],
    scans: Sequence[Scan],
) -> None:
    """Each scan takes the next strip when it is done with the one before; strips are prefetched."""
    earlier: list[Future[None] | None] = []
    running: list[Future[None] | None] = [None] * len(scans)
    prefetched = pool.submit(next, strips, None)
    strip = prefetched.result()
    while strip is not None:
        prefetched = pool.submit(next, strips, None)
        started: list[Future[None] | None] = []
        for scan, before in zip(scans, running, strict=True):
            started.append(pool.submit(_scan_after, before, scan, strip))
        earlier = running
        running = started
        # A core that something else slows down holds up the others by the next strip only.
        _wait(earlier)
        strip = prefetched.result()
    _wait(running)


def _scan_after(before: Future[None] | None, scan: Scan, strip: Strip) -> None:
    if before is not None:
        before.result()  # taken up earlier, so it ends
    with torch.no_grad():
        scan.scan(strip)


def _wait(futures: Sequence[Future[None] | None]) -> None:
    for future in futures:
        if future is not None:
            future.result()
