"""What a rank scores: its rows of a domain in strips, for some users, block by block.

A strip's vectors are copied together, since they lie far apart in the shard; a block of scores is what stays in the caches.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch

from embeddings.scores import Vectors, error, exact_scores, full_precision, product

GROUP = 32  # a block's columns are a multiple of it
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

    def of(self, shard):
        """Those that the shard has any rows of, in the order of rows."""
        for number, (begin, end) in enumerate(pairwise(self.bounds)):
            row = torch.arange(begin, end, device=shard.weight.device)
            place = shard.place(row)
            here = shard.holds(place)
            row, place = row[here], place[here]
            if len(row) == 0:
                continue
            # As wide as each other: how many of a strip lie here differs by a few.
            width = -(-len(row) // (max(1, round(len(row) / self.block)) * GROUP)) * GROUP
            m_SR = torch.empty(-(-len(row) // GROUP) * GROUP, shard.weight.shape[1], device=row.device)
            torch.index_select(shard.weight, 0, place, out=m_SR[: len(row)])
            m_SR[len(row) :] = 0
            yield Strip(number, row, place, Vectors(m_SR), width)


@dataclass(frozen=True)
class Strip:
    """row_S: of M, ascending; place_S: in the shard; items: their Vectors, and zeros up to a whole group; width: of a block."""

    number: int
    row_S: torch.Tensor
    place_S: torch.Tensor
    items: Vectors
    width: int


class UserPart:
    """Some users y_UR, and what of each is not to be shown: pairs (row, user), sorted by row, once each.

    idle_U: users for whom nothing is to be looked for, None where there is none.
    """

    def __init__(self, y_UR, excluded_row, excluded_user, shard, strips):
        self.y, self.shard, self.idle_U = Vectors(y_UR), shard, None
        self.excluded_row, self.excluded_user = excluded_row, excluded_user
        bounds = torch.tensor(strips.bounds, device=y_UR.device)
        self._cuts, self._memory = torch.searchsorted(excluded_row, bounds).tolist(), {}

    def exact(self, users_C, places_C):
        return exact_scores(self.y.vectors_VR, users_C, self.shard.weight, places_C)

    def memory(self, name, *shape):
        """A tensor that is written again for every block: fresh ones take longer than a product does."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, device=self.excluded_row.device)
        return self._memory[name][:size].view(shape)

    def blocks(self, strip):
        """The strip's scores."""
        here = slice(*self._cuts[strip.number : strip.number + 2])
        users_E, columns_E = self.excluded_user[here], torch.searchsorted(strip.row_S, self.excluded_row[here])
        items, error_U = len(strip.row_S), error(self.y, strip.items)
        bounds = [*range(0, items, strip.width), len(strip.items.vectors_VR)]
        cuts = torch.searchsorted(columns_E, torch.tensor(bounds, device=columns_E.device)).tolist()
        for (begin, end), (first, last) in zip(pairwise(bounds), pairwise(cuts), strict=True):
            scores_UN = product(self.y, strip.items, self.memory("scores", len(error_U), end - begin), begin)
            if end > items:
                scores_UN[:, items - begin :] = -torch.inf
            if self.idle_U is not None:
                scores_UN[self.idle_U] = -torch.inf
            hidden = users_E[first:last], columns_E[first:last] - begin
            if last > first:
                scores_UN[hidden] = -torch.inf
            yield Block(strip.row_S[begin:end], strip.place_S[begin:end], scores_UN, error_U, hidden)


@dataclass(frozen=True)
class Block:
    """row_N: of M, ascending; place_N: in the shard; scores_UN: the product, −inf at what is no item and what is excluded, and
    for the idle; error_U: of these; excluded: users and columns."""

    row_N: torch.Tensor
    place_N: torch.Tensor
    scores_UN: torch.Tensor
    error_U: torch.Tensor
    excluded: tuple[torch.Tensor, torch.Tensor]

    def shown(self, users_C, columns_C, scores_C):
        """Those of the pairs that are of items and not excluded; scores_C: by product."""
        if (scores_C == -torch.inf).any():
            width, (users_E, columns_E) = self.scores_UN.shape[1], self.excluded
            excluded_C = torch.isin(users_C * width + columns_C, users_E * width + columns_E)
            left_C = (columns_C < len(self.row_N)) & ~excluded_C
            users_C, columns_C, scores_C = users_C[left_C], columns_C[left_C], scores_C[left_C]
        return users_C, columns_C, scores_C


def parts_of(users, device):
    """Slices of so many users that are scored side by side: on a CPU one for each thread, where they are enough."""
    parts = 1 if device.type != "cpu" else max(1, min(torch.get_num_threads(), users // _FEWEST))
    return [slice(users * part // parts, users * (part + 1) // parts) for part in range(parts)]


def show(strips, viewers):
    """Calls each viewer's `see` with every strip, in order; the viewers run side by side.

    What is done beside the products is many short operations, which PyTorch's threads do not speed up: so each viewer has a
    core for itself.
    """

    def see(viewer, strip):
        with torch.no_grad():
            viewer.see(strip)

    with full_precision(viewers[0].part.shard.weight.device.type):
        if len(viewers) == 1:
            for strip in strips:
                see(viewers[0], strip)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(len(viewers) + 1) as pool:
                coming = pool.submit(next, strips, None)
                while (strip := coming.result()) is not None:
                    coming = pool.submit(next, strips, None)
                    for seen in [pool.submit(see, viewer, strip) for viewer in viewers]:
                        seen.result()
        finally:
            torch.set_num_threads(threads)
