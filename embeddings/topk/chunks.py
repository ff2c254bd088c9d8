"""What a rank scores: its rows of a domain in strips, for some users.

A strip's vectors are copied together, since they lie far apart in the shard, as who scores them wants them: embeddings/topk/torch_scan.py
or scan.py.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch

from embeddings.topk.bounds import Vectors, exact_scores, full_precision

_STRIP = 8  # blocks
_FEWEST = 128  # users that are worth a thread


class Shard:
    """The rows of M that this rank holds, as they are now."""

    def __init__(self, table):
        self.first, tensors = table.shard()
        self.weight, self.scatter = tensors["weight"].detach(), table.scatter

    def place(self, row):
        """Where in `weight` rows of M would be."""
        return self.scatter.stored(row) - self.first

    def row(self, place):
        """The inverse of `place`."""
        return self.scatter.row(place + self.first)

    def holds(self, place):
        return (place >= 0) & (place < len(self.weight))


class Strips:
    """The rows [first, first + items) of M in strips, of which about `block` · 8 rows lie on each of so many ranks."""

    def __init__(self, first, items, block, ranks):
        self.block = block
        span = _STRIP * block * ranks
        self.bounds = [*range(first, first + items, span), first + items]

    def of(self, shard, items_of):
        """Those that the shard has any rows of, in the order of rows. items_of(weight, place_S): their items."""
        for number, (begin, end) in enumerate(pairwise(self.bounds)):
            row = torch.arange(begin, end, device=shard.weight.device)
            place = shard.place(row)
            here = shard.holds(place)
            row, place = row[here], place[here]
            if len(row):
                # As many as there would be of `block` rows: how many of a strip lie here differs by a few.
                yield Strip(
                    number,
                    row,
                    place,
                    items_of(shard.weight, place),
                    max(1, round(len(row) / self.block)),
                )


@dataclass(frozen=True)
class Strip:
    """row_S: of M, ascending; place_S: in the shard; items: their vectors; blocks: how many to score it in."""

    number: int
    row_S: torch.Tensor
    place_S: torch.Tensor
    items: object
    blocks: int


class UserPart:
    """Some users y_UR, and what of each is not to be shown: pairs (row, user), sorted by row, once each."""

    def __init__(self, y_UR, excluded_row, excluded_user, shard, strips):
        self.y, self.shard = Vectors(y_UR), shard
        self.excluded_row, self.excluded_user = excluded_row, excluded_user
        bounds = torch.tensor(strips.bounds, device=y_UR.device)
        self._cuts = torch.searchsorted(excluded_row, bounds).tolist()

    def exact(self, users_C, places_C):
        return exact_scores(self.y.vectors_VR, users_C, self.shard.weight, places_C)

    def hidden(self, strip):
        """Pairs (user, column of the strip) that are not to be shown, by column."""
        here = slice(*self._cuts[strip.number : strip.number + 2])
        return self.excluded_user[here], torch.searchsorted(
            strip.row_S, self.excluded_row[here]
        )

    def left(self, items):
        """How many of all the shard's items, so many, are to be shown to each (U,)."""
        return items - torch.bincount(
            self.excluded_user, minlength=len(self.y.vectors_VR)
        )


def parts_of(users, device, most):
    """Slices of so many users that are scored side by side: on a CPU up to `most` for each thread, where users are enough."""
    threads = 1 if device.type != "cpu" else torch.get_num_threads()
    parts = 1 if threads == 1 else max(1, min(threads * most, users // _FEWEST))
    return [
        slice(users * part // parts, users * (part + 1) // parts)
        for part in range(parts)
    ]


def show(strips, viewers):
    """Calls each viewer's `see` with every strip, in order; the viewers run side by side.

    What is done beside the products is many short operations, which PyTorch's threads do not speed up: so each viewer has a
    core for itself.
    """

    def see(viewer, strip, before):
        if before is not None:
            before.result()  # taken up earlier, so it ends
        with torch.no_grad():
            viewer.see(strip)

    with full_precision(viewers[0].part.shard.weight.device.type):
        if len(viewers) == 1:
            for strip in strips:
                see(viewers[0], strip, None)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(threads, len(viewers)) + 1) as pool:
                earlier, seen = [], [None] * len(viewers)
                coming = pool.submit(next, strips, None)
                while (strip := coming.result()) is not None:
                    coming = pool.submit(next, strips, None)
                    pairs = list(zip(viewers, seen, strict=True))
                    earlier, seen = (
                        seen,
                        [
                            pool.submit(see, viewer, strip, before)
                            for viewer, before in pairs
                        ],
                    )
                    # A core that something else slows down holds up the others by the next strip only.
                    for one in filter(None, earlier):
                        one.result()
                for one in filter(None, seen):
                    one.result()
        finally:
            torch.set_num_threads(threads)
