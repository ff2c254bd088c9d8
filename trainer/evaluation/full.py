"""Ranking of held-out items among all items of their domain.

Beside the figures stand confidence intervals, breakdowns by groups of users, catalogue coverage,
and the Gini index of what is recommended.

A user's held-out item (trainer/data/split.py) is ranked among all items of its domain, except those
of the rest of the user's history, and of a split by time those that training has not seen.
Popularity ranks the same items, its ties broken by an order drawn for each user. Ties of the
model's scores count against it. On CPUs every figure is the same at any number of ranks; on CUDA
users' vectors, and so near ties, differ in last bits (docs/cuda.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from embeddings.topk.ranking import ExactRanking, Excluded
from syncrec.batch.views import Query, move
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.histories import UserHistories
from trainer.data.loading.jagged import row_begins
from trainer.data.loading.stream import batches_of_workers
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.bootstrap import GroupMeans
from trainer.evaluation.evaluation import (
    COMPARED,
    MODEL,
    POPULARITY,
    RECENCY,
    WITH_RECENCY,
    ComparedMeans,
    DomainFigures,
    DomainTable,
    Evaluation,
)
from trainer.evaluation.metrics import FULL_METRICS, Figures, domains_of_mean
from trainer.evaluation.popularity import Popularity
from trainer.evaluation.recency.full_term import FullTermRanking
from trainer.evaluation.recency.ranking import (
    FullRecencyRanking,
    RecencyPopularity,
)
from trainer.evaluation.recency.term import RecencyTerm
from trainer.evaluation.sampled import Advance, Model, RankingBatches
from trainer.evaluation.targets import (
    Targets,
    count_too_short,
    describe_part,
    describe_unseen,
    find_targets,
    highest_target,
    name_by_domain,
    ranked_items,
    ranked_rows,
)
from trainer.run_files import HEADLINE

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks

SHOWN = 10  # items of a user that coverage and Gini are about
LENGTHS = (1, 5, 10, 20, 50)  # where the buckets of history lengths begin
_PIECE = 1 << 20  # numbers that are summed over the ranks at once

THIRDS = ("head", "middle", "tail")
LENGTH_BUCKETS = ("1–4", "5–9", "10–19", "20–49", "50+")
HISTORY_IN_DOMAIN = ("none", "some")
BREAKDOWNS = {
    "item popularity": THIRDS,
    "history length": LENGTH_BUCKETS,
    "history in domain": HISTORY_IN_DOMAIN,
}
_NO_GROUP = -1


@dataclass(frozen=True)
class HeldOutBatch:
    """Users of one step of one rank, and their held-out items.

    user_B, domain_B, row_B: int64: the user, the held-out item's domain, the item. now_B: the ticks
    as of which the recent past is counted. length_B: of the whole history before it. domain_length_B: interactions
    of that history in the item's domain. rows_E, counts_B: every other item of the user, jagged.
    target_B: the targets' numbers (trainer/evaluation/targets.py). skipped, reasons: as in
    `RankBatch` (trainer.data.loading.stream).

    Four users of two domains, domain 1 from row 50, the test item held out:

        user_B             12       40           7       31
        domain_B           0        1            1       0
        row_B              4        51           58      9
        now_B              700      90           65000   700
        length_B           2        3            2       2
        domain_length_B    1        2            1       2
        counts_B           2        3            2       2
        rows_E             2 55     60 60 3      61 9    8 17
    """

    query: Query
    user_B: np.ndarray
    domain_B: np.ndarray
    row_B: np.ndarray
    now_B: np.ndarray
    length_B: np.ndarray
    domain_length_B: np.ndarray
    rows_E: np.ndarray
    counts_B: np.ndarray
    target_B: np.ndarray
    skipped: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class FullRanking:
    """What ranking a split among all items gives, summed over all processes.

    rank_U: int32, the position of each target, by its number, which is its user's where a user has
    one (trainer/evaluation/targets.py); 0 of those that were not ranked. term_rank_U: likewise by the
    model with its recency term; None without one. means: GroupMeans of
    `systems`; the groups of domain d are d · groups_of_domain() and those that follow: all its
    users, then those of each of BREAKDOWNS. shown: how often each row of M was among the SHOWN best
    of a user.

    The groups of domain 0; those of domain 1 begin at 12. Of a split by time a user whose item
    training has not seen is of the last one alone:

        0           all users
        1 2 3       item popularity: head, middle, tail
        4 … 8       history length: 1–4, 5–9, 10–19, 20–49, 50+
        9 10        history in domain: none, some
        11          item that training has not seen
    """

    rank_U: np.ndarray
    means: GroupMeans
    shown: np.ndarray
    skipped_users: int
    reasons: tuple[str, ...]
    systems: tuple[str, ...] = (MODEL, POPULARITY)
    recency_choice: dict[str, Any] | None = None
    recency_term: dict[str, Any] | None = None
    term_rank_U: np.ndarray | None = None


class HeldOutBatches(RankingBatches):
    """As RankingBatches, without candidates."""

    def build(
        self, users: UserHistories, targets: Targets | None = None
    ) -> Any:
        """A HeldOutBatch: histories up to the held-out items, these, and the users' others.

        targets: of these users; None: all of them. Of the history 2 55 9, the oldest item first:

            leave-one-out    held out    others
            test             9           2 55
            validation       55          2 9
        """
        dataset = self.plan.dataset
        if targets is None:
            targets = find_targets(dataset, self.part, users)
        targets = self._of_domain(users, targets)
        ends_B = np.cumsum(users.lengths_B)[targets.user_T]
        lengths_B = users.lengths_B[targets.user_T]
        begins_B = ends_B - lengths_B
        held_out_B = begins_B + targets.place_T
        row_B = users.items_N[held_out_B].astype(np.int64)
        ticks_B = users.ticks_N[held_out_B].astype(np.int64)
        domain_B = dataset.domain_of(row_B)
        domain_length_B = np.zeros(len(row_B), np.int64)
        others = [np.zeros(0, np.int64)]
        for target, (begin, end) in enumerate(
            zip(begins_B, ends_B, strict=True)
        ):
            place = targets.place_T[target]
            items = users.items_N[begin:end]
            history_domains = dataset.domain_of(items[:place])
            same_domain = history_domains == domain_B[target]
            domain_length_B[target] = np.count_nonzero(same_domain)
            others.append(np.delete(items, place))
        no_candidates = np.zeros(0, np.int64)
        query = self.query(users, targets, no_candidates)
        return HeldOutBatch(
            query=query,
            user_B=users.number_B[targets.user_T],
            domain_B=domain_B,
            row_B=row_B,
            now_B=dataset.split.counted_until(self.part, ticks_B),
            length_B=targets.place_T,
            domain_length_B=domain_length_B,
            rows_E=np.concatenate(others),
            counts_B=lengths_B - 1,
            target_B=targets.number_T,
        )

    def _of_domain(self, users: UserHistories, targets: Targets) -> Targets:
        """Those of the targets that are of the one domain, where the model knows one alone."""
        if self.only_domain is None:
            return targets
        begins_B = row_begins(users.lengths_B)
        row_T = users.items_N[begins_B[targets.user_T] + targets.place_T]
        domain_T = self.plan.dataset.domain_of(row_T)
        return targets.choose(domain_T == self.only_domain)


class _DomainRankings:
    """An exact ranking of each domain's items, and how often each item was recommended."""

    def __init__(
        self, table: "ItemTable", dataset: Dataset, only_domain: int | None
    ):
        self.domains = dataset.domains
        # Of the domains that are ranked.
        self.numbers = range(len(dataset.domains))
        if only_domain is not None:
            self.numbers = range(only_domain, only_domain + 1)
        self.rankings = []
        for domain in dataset.domains:
            ranking = ExactRanking(
                table,
                domain.start,
                domain.items,
                ranked_N=ranked_items(dataset, domain),
            )
            self.rankings.append(ranking)
        self.shown_N = np.zeros(dataset.num_embeddings, np.int64)

    def rank(self, y_BDR: torch.Tensor, batch: HeldOutBatch) -> np.ndarray:
        """The position of each held-out item, int64 (B,). Called on all ranks.

        y_BDR: the users' vectors for each domain. Of the users of `HeldOutBatch`, domain 0 ranks
        the first and the last one, and domain 1 the others; each counts what it would show all
        four:

            domain_B      0    1    1    0
            position_B    3    1    7    2
        """
        rows_E = batch.rows_E.astype(np.int64)
        excluded = Excluded(
            torch.from_numpy(rows_E),
            torch.from_numpy(batch.counts_B),
        )
        position_B = np.zeros(len(batch.user_B), np.int64)
        for number in self.numbers:
            y_BR = y_BDR[:, number]
            self._count_shown(number, y_BR, excluded)
            in_domain_B = batch.domain_B == number
            position_B[in_domain_B] = self._positions(
                number, y_BR, batch, excluded, in_domain_B
            )
        return position_B

    def _count_shown(
        self, number: int, y_BR: torch.Tensor, excluded: Excluded
    ) -> None:
        """Counts the best items of the domain for each user."""
        most = min(SHOWN, self.domains[number].items)
        best = self.rankings[number].top_k(y_BR, most, excluded)
        rows_Bk = best.rows_Bk.cpu().numpy()
        shown = rows_Bk[rows_Bk >= 0]
        # Few of them beside the rows of M: one count each, not one for every row.
        np.add.at(self.shown_N, shown, 1)

    def _positions(
        self,
        number: int,
        y_BR: torch.Tensor,
        batch: HeldOutBatch,
        excluded: Excluded,
        in_domain_B: np.ndarray,
    ) -> np.ndarray:
        """The positions of the held-out items that are of this domain."""
        members = torch.from_numpy(in_domain_B)
        repeated_E = np.repeat(in_domain_B, batch.counts_B)
        in_domain_E = torch.from_numpy(repeated_E)
        rows = torch.from_numpy(batch.row_B)
        excluded_of_members = Excluded(
            excluded.rows_E[in_domain_E],
            excluded.counts_B[members],
        )
        positions = self.rankings[number].positions(
            y_BR[members.to(y_BR.device)],
            rows[members],
            excluded_of_members,
        )
        return positions.cpu().numpy()


@torch.no_grad()
def rank_fully(
    model: Model,
    table: "ItemTable",
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    split: str,
    advance: Advance | None = None,
    workers: int | None = None,
    recency: RecencyPopularity | None = None,
    term: RecencyTerm | None = None,
) -> FullRanking:
    """Ranks every user of a split among all items of a domain. Called on all ranks.

    advance(done, total): called after every step. workers: as `ready` takes them. recency, term:
    recency popularity, and what adds to the model's scores: they rank beside the model and
    popularity.
    """
    batches = _held_out_batches(dataset, ranks, config, split)
    rankings = _DomainRankings(table, dataset, batches.only_domain)
    systems = _Systems(table, dataset, config.seed, recency, term)
    position_U = np.zeros(highest_target(dataset, split), np.int32)
    skipped = 0
    reasons: dict[str, None] = {}
    built = batches_of_workers(
        batches,
        config.stream,
        pin_memory=False,
        workers=workers,
    )
    for done, batch in enumerate(built, start=1):
        skipped += batch.skipped
        reasons |= dict.fromkeys(batch.reasons)
        query = move(batch.query, ranks.device)
        y_BDR = model(query, table(query.ids))
        # A rank without users has one to look up with.
        y_BDR = y_BDR[: len(batch.user_B)]
        position_B = rankings.rank(y_BDR, batch)
        position_U[batch.target_B] = position_B
        systems.add(batch, y_BDR, position_B)
        if advance is not None:
            advance(done, len(batches))
    means = systems.means()
    means.reduce(ranks.device)
    skipped_1 = np.array([skipped])
    _sum_in_place(rankings.shown_N, ranks.device)
    _sum_in_place(skipped_1, ranks.device)
    return FullRanking(
        rank_U=sum_over_ranks(position_U),
        means=means,
        shown=rankings.shown_N,
        skipped_users=int(skipped_1[0]),
        reasons=tuple(reasons),
        systems=systems.names,
        recency_choice=None if recency is None else recency.choice.to_record(),
        recency_term=None if term is None else term.to_record(dataset),
        term_rank_U=systems.term_positions(position_U),
    )


@dataclass(frozen=True)
class _RankedBatch:
    """The users of a step, their groups, and their positions by the model and by popularity.

    user_B       12     40
    target_B     12     40
    groups_BG    0 2    11 14
    positions    1 7    4 9
    """

    user_B: np.ndarray
    target_B: np.ndarray
    groups_BG: np.ndarray
    positions: tuple[np.ndarray, np.ndarray]


class _Systems:
    """The positions of all systems, and their means.

    By popularity and the model each step is ranked at once. What is known of the recent past is
    another on every day: by that, users are ranked day after day, once all are there.
    """

    def __init__(
        self,
        table: "ItemTable",
        dataset: Dataset,
        seed: int,
        recency: RecencyPopularity | None,
        term: RecencyTerm | None,
    ) -> None:
        names = [MODEL, POPULARITY]
        self._dataset = dataset
        self._popularity = Popularity(dataset, seed)
        self._recency = None
        if recency is not None:
            names.append(RECENCY)
            self._recency = FullRecencyRanking(recency, dataset)
        self._term = None
        if term is not None:
            names.append(WITH_RECENCY)
            self._term = FullTermRanking(table, dataset, term)
        self.names = tuple(names)
        all_groups = len(dataset.domains) * groups_of_domain()
        self._means = GroupMeans(len(names), all_groups, seed)
        self._ranked: list[_RankedBatch] = []
        self._of_term: list[np.ndarray] = []

    def add(
        self,
        batch: HeldOutBatch,
        y_BDR: torch.Tensor,
        position_B: np.ndarray,
    ) -> None:
        """Adds a step's users. y_BDR: their vectors; position_B: by the model."""
        jagged = (batch.counts_B, batch.rows_E)
        popularity_B = self._popularity.positions(
            batch.user_B, batch.domain_B, batch.row_B, *jagged
        )
        if self._recency is not None:
            self._recency.add(
                batch.user_B,
                batch.domain_B,
                batch.row_B,
                batch.now_B,
                *jagged,
            )
        if self._term is not None:
            self._term.add(
                y_BDR, batch.domain_B, batch.row_B, batch.now_B, *jagged
            )
        third_B = self._popularity.third_N[batch.row_B]
        ranked = _RankedBatch(
            batch.user_B,
            batch.target_B,
            groups(batch, third_B, self._dataset.is_trained(batch.row_B)),
            (position_B, popularity_B),
        )
        self._ranked.append(ranked)

    def means(self) -> GroupMeans:
        """The means over this rank's users, after the last step. Called on all ranks."""
        later = []
        if self._recency is not None:
            later.append(self._recency.positions())
        if self._term is not None:
            self._of_term = self._term.positions()
            later.append(self._of_term)
        for index, ranked in enumerate(self._ranked):
            positions = [*ranked.positions]
            for of_steps in later:
                positions.append(of_steps[index])
            self._means.add(ranked.user_B, ranked.groups_BG, positions)
        return self._means

    def term_positions(self, like_U: np.ndarray) -> np.ndarray | None:
        """All ranks' positions with the term, by the targets' numbers; None without one.

        Called on all ranks, after `means`.
        """
        if self._term is None:
            return None
        position_U = np.zeros_like(like_U)
        for ranked, position_B in zip(self._ranked, self._of_term, strict=True):
            position_U[ranked.target_B] = position_B
        return sum_over_ranks(position_U)


def _held_out_batches(
    dataset: Dataset, ranks: "Ranks", config: RunConfig, split: str
) -> HeldOutBatches:
    """This rank's users and their held-out items, as the run is configured."""
    return HeldOutBatches(
        dataset,
        ranks.rank,
        ranks.world_size,
        config.evaluation,
        config.model.max_length,
        split,
        config.seed,
        stream=config.stream,
        both_views=config.model.predicts_by_both,
    )


def _sum_in_place(values_M: np.ndarray, device: torch.device) -> None:
    """Makes an array the sum of all ranks' arrays, a piece at a time."""
    for begin in range(0, len(values_M), _PIECE):
        end = begin + _PIECE
        piece = torch.from_numpy(values_M[begin:end])
        total = piece.to(device)
        dist.all_reduce(total)
        piece.copy_(total)


def groups_of_domain() -> int:
    """How many groups a domain has: all its users, those of each breakdown, and unseen items."""
    groups_of_breakdowns = [len(names) for names in BREAKDOWNS.values()]
    return 1 + sum(groups_of_breakdowns) + 1


def groups(
    batch: HeldOutBatch, third_B: np.ndarray, is_seen_B: np.ndarray
) -> np.ndarray:
    """The numbers of each user's groups, int64 (B, 1 + BREAKDOWNS), −1 for none.

    third_B: the held-out item's third by popularity (trainer/evaluation/popularity.py). is_seen_B:
    whether training has the item. Three users:

        domain_B           0            1               1
        third_B            2            0               2
        length_B           12           3               8
        domain_length_B    4            0               1
        is_seen_B          True         True            False
        groups             0 3 6 10     12 13 16 21     23 -1 -1 -1
    """
    first_B = batch.domain_B * groups_of_domain()
    bucket_B = np.searchsorted(LENGTHS, batch.length_B, side="right") - 1
    some_B = (batch.domain_length_B > 0).astype(np.int64)
    columns = [first_B]
    begin = 1
    indices = (third_B, bucket_B, some_B)  # within each breakdown
    for names, index_B in zip(BREAKDOWNS.values(), indices, strict=True):
        columns.append(first_B + begin + index_B)
        begin += len(names)
    groups_BG = np.stack(columns, 1)
    groups_BG[~is_seen_B] = _NO_GROUP
    groups_BG[~is_seen_B, 0] = first_B[~is_seen_B] + groups_of_domain() - 1
    return groups_BG


def full_evaluation(
    split: str,
    dataset: Dataset,
    ranking: FullRanking,
    sampled: dict[str, Any] | None = None,
    *,
    min_users: int = 1,
    **model_state: Any,
) -> Evaluation:
    """The figures of a full ranking. sampled: the record of the ranking among drawn candidates.

    min_users: of a domain that counts in the mean over domains (`evaluation.min_users`).
    """
    means = ranking.means
    # Of the domains: their groups' numbers begin at these.
    first_of = {}
    rows = []
    breakdown = {}
    recommendations = {}
    for number, domain in enumerate(dataset.domains):
        first = number * groups_of_domain()
        first_of[domain.name] = first
        rows.append(_figures_of(ranking, domain.name, first))
        breakdown[domain.name] = _breakdown(ranking, first)
        shown_N = ranking.shown[ranked_rows(dataset, domain)]
        recommendations[domain.name] = recommended(shown_N)
    users = {row.name: row.users for row in rows}
    mean_domains = domains_of_mean(users, min_users)
    firsts = list(first_of.values())
    counted = [first_of[name] for name in mean_domains]
    full = {
        "difference": _differences(means, 1, first_of, counted),
        "breakdown": breakdown,
        "recommended": recommendations,
    }
    if RECENCY in ranking.systems:
        system = ranking.systems.index(RECENCY)
        full["recency_difference"] = _differences(
            means, system, first_of, counted
        )
    if sampled:
        full["sampled"] = sampled
    return Evaluation(
        kind=split,
        by_domain=DomainTable(rows, FULL_METRICS),
        mean=means.mean(0, counted),
        compared=_compared_means(ranking, firsts, counted),
        too_short=count_too_short(dataset),
        skipped_users=ranking.skipped_users,
        split=describe_part(dataset, split),
        unseen=_unseen_figures(dataset, ranking),
        model_state=model_state,
        full=full,
        recorded_domains=tuple(mean_domains),
        min_users=min_users,
        recorded_user_mean=means.user_mean(0, firsts),
        recency_choice=ranking.recency_choice,
        recency_term=ranking.recency_term,
    )


def _compared_means(
    ranking: FullRanking, firsts: list[int], counted: list[int]
) -> dict[str, ComparedMeans]:
    """The means of what ranks beside the model.

    firsts, counted: the groups of all users of each domain, and of the domains that count.
    """
    compared = {}
    for system, name in enumerate(ranking.systems):
        if name != MODEL:
            mean = ranking.means.mean(system, counted)
            user_mean = ranking.means.user_mean(system, firsts)
            compared[name] = ComparedMeans(mean, user_mean)
    return compared


def _figures_of(ranking: FullRanking, name: str, first: int) -> DomainFigures:
    """A domain's figures by all systems. first: the group of all its users."""
    by_system: dict[str, Figures] = {key: {} for key in COMPARED}
    for system, key in enumerate(ranking.systems):
        by_system[key] = ranking.means.figures(system, first)
    figures = by_system.pop(MODEL)
    return DomainFigures(name, figures, **by_system)


def _differences(
    means: GroupMeans,
    system: int,
    first_of: dict[str, int],
    counted: list[int],
) -> dict[str, Any]:
    """How much more of the headline metric the model has than another system.

    first_of: by domain, the number of the group of all its users. counted: of the domains that
    count in the mean.
    """
    domains = {}
    for name, first in first_of.items():
        domains[name] = means.difference(first, HEADLINE, system)
    firsts = list(first_of.values())
    return {
        "metric": HEADLINE,
        "domains": domains,
        "mean": means.mean_difference(counted, HEADLINE, system),
        "user_mean": means.user_mean_difference(firsts, HEADLINE, system),
    }


def _unseen_figures(
    dataset: Dataset, ranking: FullRanking
) -> dict[str, Any] | None:
    """The figures of targets whose item training has not seen; None of leave-one-out."""
    if dataset.training is None:
        return None
    by_system = {}
    last = groups_of_domain() - 1
    for system, name in enumerate(ranking.systems):
        figures = []
        for number in range(len(dataset.domains)):
            group = number * groups_of_domain() + last
            figures.append(ranking.means.figures(system, group))
        by_system[name] = name_by_domain(dataset, figures)
    return describe_unseen(dataset, by_system)


def full_record(
    kind: str,
    dataset: Dataset,
    ranking: FullRanking,
    sampled: dict[str, Any] | None = None,
    **where: Any,
) -> dict[str, Any]:
    """The record of `full_evaluation`, which a run writes and prints. kind: the split."""
    evaluation = full_evaluation(kind, dataset, ranking, sampled, **where)
    return evaluation.to_record()


def _breakdown(ranking: FullRanking, first: int) -> dict[str, dict[str, Any]]:
    """{breakdown: {group: figures}} of the domain whose groups begin at `first`.

    {"item popularity": {"head": {"users": 66, "HR@1": 0.08, …, "popularity NDCG@10": 0.5}, …}, …}
    """
    breakdowns = {}
    group = first + 1
    for breakdown, names in BREAKDOWNS.items():
        figures_of_groups = {}
        for name in names:
            figures = ranking.means.figures(0, group)
            for system, beside in enumerate(ranking.systems):
                if beside != MODEL:
                    of_system = ranking.means.figures(system, group)
                    figures[f"{beside} {HEADLINE}"] = of_system[HEADLINE]
            figures_of_groups[name] = figures
            group += 1
        breakdowns[breakdown] = figures_of_groups
    return breakdowns


def recommended(counts_N: np.ndarray) -> dict[str, float | int | None]:
    """How evenly recommendations are spread over a domain's items.

    items: of the domain. coverage: the share of them that anybody is shown. gini: the Gini index of
    how often each is shown, 0 where all are equally often, towards 1 where few take all. Both are
    None where nobody is shown anything. counts_N: int64, how often each item was shown. Of four
    items:

        counts_N    coverage    gini
        2 2 2 2     1.0         0.0
        0 0 0 8     0.25        0.75
    """
    items = len(counts_N)
    total = int(counts_N.sum())
    coverage_name = f"coverage@{SHOWN}"
    gini_name = f"gini@{SHOWN}"
    if total == 0:
        return {
            "items": items,
            coverage_name: None,
            gini_name: None,
        }
    coverage = float(np.count_nonzero(counts_N) / items)
    ascending = np.sort(counts_N).astype(np.float64)
    place_N = np.arange(1, items + 1)
    weight_N = 2 * place_N - items - 1
    spread = weight_N @ ascending
    gini = float(spread / (items * total))
    return {
        "items": items,
        coverage_name: coverage,
        gini_name: gini,
    }
