"""The recency term among all items: positions by score and term, exact, on the sharded table.

The term is a bias of each item on a day (embeddings/topk/item_bias.py). So users are kept step by
step, and ranked in the end: a domain's users of one day together, on all ranks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from embeddings.topk.item_bias import BiasedTable, with_one
from embeddings.topk.ranking import ExactRanking, Excluded
from trainer.data.format.dataset import Dataset
from trainer.data.loading.jagged import join_ranges, row_begins
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.recency.ranking import (
    UsersOfStep,
    join_steps,
    split_by_steps,
)
from trainer.evaluation.recency.term import RecencyTerm
from trainer.evaluation.targets import ranked_items

if TYPE_CHECKING:
    from embeddings.table import ItemTable


@dataclass(frozen=True)
class _TermUsers(UsersOfStep):
    """Users of one step. y_BR: their vectors for the held-out item's domain, float32.

    The rest is jagged as `HeldOutBatch` has it. day_B: for which is predicted.

        domain_B    0      1
        row_B       4      51
        day_B       31     4
        counts_B    2      3
        rows_E      2 55   60 60 3
    """

    y_BR: np.ndarray
    row_B: np.ndarray
    day_B: np.ndarray
    counts_B: np.ndarray
    rows_E: np.ndarray


class FullTermRanking:
    """Positions of held-out items among all items of their domain, by the model with its term.

    In memory stay each user's vector and the rows that are not compared.
    """

    def __init__(
        self, table: "ItemTable", dataset: Dataset, term: RecencyTerm
    ) -> None:
        self._table = table
        self._dataset = dataset
        self._term = term
        self._steps: list[_TermUsers] = []

    def add(
        self,
        y_BDR: torch.Tensor,
        domain_B: np.ndarray,
        row_B: np.ndarray,
        now_B: np.ndarray,
        counts_B: np.ndarray,
        rows_E: np.ndarray,
    ) -> None:
        """Adds the users of a step, jagged as `Popularity.positions` draws it.

        y_BDR: their vectors for each domain. now_B: ticks for which is predicted.
        """
        index_B = torch.arange(len(domain_B), device=y_BDR.device)
        domains = torch.from_numpy(domain_B).to(y_BDR.device)
        users = _TermUsers(
            y_BR=y_BDR[index_B, domains].float().cpu().numpy(),
            domain_B=domain_B,
            row_B=row_B,
            day_B=self._term.features.counts.days.of_ticks(now_B),
            counts_B=counts_B,
            rows_E=rows_E.astype(np.int64),
        )
        self._steps.append(users)

    def positions(self) -> list[np.ndarray]:
        """The positions of each step's held-out items, int64. Called on all ranks.

        Two steps of two users, of which three are of one domain and day and ranked together:

            group_U      81 90 | 81 81
            positions    [3, 1], [7, 2]
        """
        days = self._term.features.counts.days.count
        users = join_steps(self._steps)
        group_U = users.domain_B * days + users.day_B
        present = np.zeros(len(self._dataset.domains) * days, np.int64)
        present[group_U] = 1
        position_U = np.zeros(len(group_U), np.int64)
        table = BiasedTable(self._table)
        begin_U = row_begins(users.counts_B)
        for group in np.flatnonzero(sum_over_ranks(present)).tolist():
            number, day = divmod(group, days)
            self._set_biases(table, number, day)
            (members,) = np.nonzero(group_U == group)
            counts_M = users.counts_B[members]
            place_E = join_ranges(begin_U[members], counts_M)
            excluded = Excluded(
                torch.from_numpy(users.rows_E[place_E]),
                torch.from_numpy(counts_M),
            )
            score = self._term.weight_DK[number, 0]
            domain = self._dataset.domains[number]
            ranking = ExactRanking(
                cast("ItemTable", table),
                domain.start,
                domain.items,
                ranked_N=ranked_items(self._dataset, domain),
            )
            y_MR = torch.from_numpy(users.y_BR[members])
            found_M = ranking.positions(
                with_one(y_MR * score),
                torch.from_numpy(users.row_B[members]),
                excluded,
            )
            position_U[members] = found_M.cpu().numpy()
        return split_by_steps(position_U, self._steps)

    def _set_biases(self, table: BiasedTable, number: int, day: int) -> None:
        """Sets the biases of a domain's items as of a day.

        Those of other domains stay what they were: they are not ranked meanwhile.
        """
        domain = self._dataset.domains[number]
        rows_N = domain.rows
        bias_N = self._term.biases(number, rows_N, day)
        table.set_biases(domain.start, torch.from_numpy(bias_N))
