"""The best items of each domain for users, scored by all ranks and gathered to the first.

Legend of shapes: U users of some parts, S steps of this rank, B users of one step, D domains, R the
model's width, k columns of a result, E excluded rows, N interactions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from embeddings.topk.item_bias import BiasedTable, with_one
from embeddings.topk.ranking import ExactRanking, Excluded
from syncrec.batch.views import move
from trainer.checkpoint.best_model import TrainedModel
from trainer.config.serving import RecommendConfig
from trainer.data.format.dataset import TICKS
from trainer.data.format.vocabulary import read_item_ids
from trainer.evaluation.recency.term import RecencyTerm
from trainer.evaluation.sampled import build_history_query
from trainer.files.atomic import Patience, retry_patiently
from trainer.serving.user_histories import UserHistories, read_histories

if TYPE_CHECKING:
    from embeddings.table import ItemTable

_NO_USERS = UserHistories(
    ids=pa.array([]),
    lengths_B=np.zeros(0, np.int64),
    rows_N=np.zeros(0, np.int32),
    ticks_N=np.zeros(0, np.uint16),
)


@dataclass(frozen=True)
class DomainTop:
    """The best items of one domain for the users of a part.

    rows_Bk: rows of M, int32, best first; −1 where fewer items are left. scores_Bk: float32, −inf
    there. Two users of a domain with rows 8 to 11, where the second has had three of its items:

        rows_Bk     [[10,  8],      scores_Bk  [[1.5,  0.2],
                     [ 9, -1]]                  [0.7, -inf]]
    """

    domain: int
    rows_Bk: np.ndarray
    scores_Bk: np.ndarray


class _Unit(NamedTuple):
    """Users that are scored together: those of a part, by its place, from `begin` on."""

    part: int
    begin: int


class PartReader:
    """Reads histories of some parts when they are needed; keeps the newest one."""

    def __init__(
        self,
        folder: Path,
        parts: list[int],
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._newest: tuple[int, UserHistories] | None = None

    def read(self, index: int) -> UserHistories:
        """All users of the part at that index of `parts`."""
        newest = self._newest
        if newest is not None and newest[0] == index:
            return newest[1]
        number = self._parts[index]
        # The first rank has written them, perhaps on another host.
        histories = retry_patiently(
            lambda: read_histories(self._folder, number), Patience(self._folder)
        )
        self._newest = (index, histories)
        return histories

    def read_users(
        self,
        index: int,
        begin: int,
        count: int,
    ) -> UserHistories:
        """Some users of a part."""
        part = self.read(index)
        end = begin + count
        first = int(part.lengths_B[:begin].sum())
        last = int(part.lengths_B[:end].sum())
        return UserHistories(
            ids=part.ids.slice(begin, count),
            lengths_B=part.lengths_B[begin:end],
            rows_N=part.rows_N[first:last],
            ticks_N=part.ticks_N[first:last],
        )


class Scorer:
    """Finds the top items of a part's users by exact search over the sharded item table."""

    def __init__(
        self,
        served: TrainedModel,
        domains: list[int],
        config: RecommendConfig,
        term: RecencyTerm | None = None,
    ) -> None:
        """domains: their numbers, rising. term: adds to the scores, as of the dataset's end."""
        self.served = served
        self.config = config
        self._term = term
        table = served.table
        if term is not None:
            table = cast("ItemTable", _biased_table(served, domains, term))
        self.rankings: dict[int, ExactRanking] = {}
        self.k: dict[int, int] = {}
        for number in domains:
            domain = served.dataset.domains[number]
            ranking = ExactRanking(
                table,
                domain.start,
                domain.items,
            )
            self.rankings[number] = ranking
            self.k[number] = min(config.k, domain.items)
        self._item_ids: dict[int, pa.Array] = {}

    def item_ids(self, number: int) -> pa.Array:
        """Raw ids of a domain's items, in the order of their rows."""
        if number not in self._item_ids:
            dataset = self.served.dataset
            self._item_ids[number] = read_item_ids(
                dataset, dataset.domains[number]
            )
        return self._item_ids[number]

    def group_parts(
        self,
        parts: list[int],
        part_users: int,
    ) -> list[list[int]]:
        """Parts that are scored together: so many that each rank has users in a step."""
        steps = -(-part_users // self.config.batch_size)
        size = -(-self.served.ranks.world_size // steps)
        return [
            parts[begin : begin + size] for begin in range(0, len(parts), size)
        ]

    @torch.no_grad()
    def score_parts(
        self,
        sizes: list[int],
        reader: PartReader,
        advance: Callable[[int], None],
    ) -> list[list[DomainTop]]:
        """The top items of each part, domain by domain, on the first rank.

        Called on all ranks; on the others, arrays are empty. sizes: users of each part. advance:
        called with the users of each step.
        """
        batch_size = self.config.batch_size
        world_size = self.served.ranks.world_size
        units = self._cut_into_units(sizes)
        steps = -(-len(units) // world_size)
        width = sum(self.k.values())
        rows_SBk = torch.full(
            (steps, batch_size, width),
            -1,
            dtype=torch.int32,
        )
        scores_SBk = torch.full((steps, batch_size, width), -torch.inf)
        for step in range(steps):
            step_units = units[step * world_size : (step + 1) * world_size]
            users = self._read_own_users(step_units, reader)
            self._rank_items(
                users,
                rows_SBk[step],
                scores_SBk[step],
            )
            finished = 0
            for unit in step_units:
                finished += min(batch_size, sizes[unit.part] - unit.begin)
            advance(finished)
        rows_Uk = self._gather(rows_SBk, len(units))
        scores_Uk = self._gather(scores_SBk, len(units))
        return self._cut_into_parts(
            sizes,
            rows_Uk,
            scores_Uk,
        )

    def _cut_into_units(self, sizes: list[int]) -> list[_Unit]:
        """Which users are scored together depends on the part alone, and so do the sums."""
        units = []
        for part, users in enumerate(sizes):
            for begin in range(0, users, self.config.batch_size):
                units.append(_Unit(part, begin))
        return units

    def _read_own_users(
        self,
        step_units: list[_Unit],
        reader: PartReader,
    ) -> UserHistories:
        """This rank's users of a step."""
        rank = self.served.ranks.rank
        if rank >= len(step_units):
            return _NO_USERS
        unit = step_units[rank]
        return reader.read_users(
            unit.part,
            unit.begin,
            self.config.batch_size,
        )

    def _rank_items(
        self,
        users: UserHistories,
        rows_Bk: torch.Tensor,
        scores_Bk: torch.Tensor,
    ) -> None:
        """Fills in a step's results, the domains' columns side by side."""
        y_BDR = self._user_vectors(users)
        seen = None
        if not self.config.keep_seen:
            rows_E = torch.from_numpy(users.rows_N.astype(np.int64))
            seen = Excluded(rows_E, torch.from_numpy(users.lengths_B))
        count = len(users.lengths_B)
        first = 0
        for number, ranking in self.rankings.items():
            k = self.k[number]
            y_BR = y_BDR[:, number]
            if self._term is not None:
                y_BR = with_one(y_BR * self._term.weight_DK[number, 0])
            top = ranking.top_k(y_BR, k, seen)
            rows_Bk[:count, first : first + k] = top.rows_Bk.cpu().int()
            scores_Bk[:count, first : first + k] = top.scores_Bk.cpu()
            first += k

    def _user_vectors(self, users: UserHistories) -> torch.Tensor:
        """What each domain's items are scored with at the dataset's last time, (B, D, R).

        A rank without users takes part in the look-up.
        """
        served = self.served
        lengths_B = users.lengths_B
        if not len(lengths_B):
            lengths_B = np.zeros(1, np.int64)
        query = build_history_query(
            served.dataset,
            users.rows_N,
            users.ticks_N,
            lengths_B,
            np.full(len(lengths_B), TICKS),
            served.config.model.max_length,
            np.zeros(0, np.int64),
            served.model.config.predicts_by_both,
        )
        query = move(query, served.ranks.device)
        y_BDR = served.model(query, served.table(query.ids))
        return y_BDR[: len(users.lengths_B)]

    def _gather(
        self,
        values_SBk: torch.Tensor,
        units: int,
    ) -> np.ndarray:
        """All ranks' steps on the first rank, in the order of the users, (U, k).

        Each unit of users is as long as a step, whatever users it has.
        """
        ranks = self.served.ranks
        if not ranks.first:
            dist.gather(values_SBk, None, dst=0)
            return np.zeros((0, values_SBk.shape[2]), values_SBk.numpy().dtype)
        gathered = [
            torch.empty_like(values_SBk) for _ in range(ranks.world_size)
        ]
        dist.gather(
            values_SBk,
            gathered,
            dst=0,
        )
        values_UBk = torch.stack(gathered, 1).flatten(0, 1)[:units]
        return values_UBk.flatten(0, 1).numpy()

    def _cut_into_parts(
        self,
        sizes: list[int],
        rows_Uk: np.ndarray,
        scores_Uk: np.ndarray,
    ) -> list[list[DomainTop]]:
        """Takes apart the users of parts, and the columns of domains."""
        batch_size = self.config.batch_size
        parts = []
        first_user = 0
        for users in sizes:
            part = slice(first_user, first_user + users)
            tops = []
            first_column = 0
            for number, k in self.k.items():
                columns = slice(first_column, first_column + k)
                tops.append(
                    DomainTop(
                        number,
                        rows_Uk[part, columns],
                        scores_Uk[part, columns],
                    )
                )
                first_column += k
            parts.append(tops)
            first_user += -(-users // batch_size) * batch_size
        return parts


def _biased_table(
    served: TrainedModel, domains: list[int], term: RecencyTerm
) -> BiasedTable:
    """The item vectors with what the term adds on the day after the dataset's last."""
    table = BiasedTable(served.table)
    day = term.features.counts.days.count
    for number in domains:
        domain = served.dataset.domains[number]
        rows_N = domain.rows
        bias_N = term.biases(number, rows_N, day)
        table.set_biases(domain.start, torch.from_numpy(bias_N))
    return table
