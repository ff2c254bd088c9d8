"""Ranking of held-out items among all items of their domain, with intervals, breakdowns, and what is recommended at all.

A user's held-out item is ranked among all items of its domain but those of the rest of the user's history. Popularity ranks the
same items; of those as popular as the item it puts before it as many as an order would that is drawn for each user (from the
seed). Ties of the model's scores count against it. On CPUs every figure is the
same at any number of ranks; on CUDA users' vectors, and so near ties, differ in last bits (docs/gpu.md).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from embeddings.topk.ranking import ExactRanking, Excluded
from syncrec.batch.build import Query, move
from trainer.data.counter_rng import RandomStream, random_below, random_bits
from trainer.data.format.dataset import SPLIT_LENGTH
from trainer.data.format.vocabulary import item_counts
from trainer.data.loading.stream import ready
from trainer.evaluation.bootstrap import GroupMeans
from trainer.evaluation.sampled import RankingBatches

SHOWN = 10  # items of a user that coverage and Gini are about
LENGTHS = (1, 5, 10, 20, 50)  # where the buckets of history lengths begin
HEADLINE = "NDCG@10"
_PIECE = 1 << 20  # numbers that are summed over the ranks at once

POPULARITY = ("head", "middle", "tail")
OWN = ("none", "some")
BREAKDOWNS = {
    "item popularity": POPULARITY,
    "history length": tuple(
        f"{low}–{high - 1}" if high else f"{low}+"
        for low, high in zip(LENGTHS, (*LENGTHS[1:], None), strict=True)
    ),
    "history in domain": OWN,
}


@dataclass(frozen=True)
class Held:
    """Users of one step of one rank, and their held-out items.

    user_B, domain_B, row_B: int64: the user, the item's domain, the item. length_B: of the history before it, whole; own_B: how
    much of that is of the item's domain. rows_E, counts_B: every other item of the user, jagged. skipped, reasons: as in Fed.
    """

    query: Query
    user_B: np.ndarray
    domain_B: np.ndarray
    row_B: np.ndarray
    length_B: np.ndarray
    own_B: np.ndarray
    rows_E: np.ndarray
    counts_B: np.ndarray
    skipped: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class FullRanking:
    """What ranking a split among all items gives, summed over all processes.

    rank_U: int32, of each user of the dataset, by number; 0 of those that were not ranked.
    means: GroupMeans of the model and of popularity; the groups of domain d are d · groups_of_domain() and those that follow:
    all its users, then those of each of BREAKDOWNS. shown: how often each row of M was among the SHOWN best of a user.
    """

    rank_U: np.ndarray
    means: GroupMeans
    shown: np.ndarray
    skipped_users: int
    reasons: tuple[str, ...]


class HeldBatches(RankingBatches):
    """As RankingBatches, without candidates."""

    def build(self, users):
        dataset = self.plan.dataset
        ends_B = np.cumsum(users.lengths_B)
        keep_B = users.lengths_B >= SPLIT_LENGTH
        if self.alone is not None:
            keep_B[keep_B] = (
                dataset.domain_of(users.items_N[ends_B[keep_B] - self.back])
                == self.alone
            )
        lengths_B, ends_B = users.lengths_B[keep_B], ends_B[keep_B]
        items = [
            users.items_N[end - length : end]
            for length, end in zip(lengths_B, ends_B, strict=True)
        ]
        row_B = np.array([own[-self.back] for own in items], np.int64)
        domain_B = dataset.domain_of(row_B)
        own_B = [
            np.count_nonzero(dataset.domain_of(own[: -self.back]) == d)
            for own, d in zip(items, domain_B, strict=True)
        ]
        others = [np.delete(own, len(own) - self.back) for own in items]
        return Held(
            query=self.query(users, np.flatnonzero(keep_B), np.zeros(0, np.int64)),
            user_B=users.number_B[keep_B],
            domain_B=domain_B,
            row_B=row_B,
            length_B=lengths_B - self.back,
            own_B=np.array(own_B, np.int64),
            rows_E=np.concatenate([*others, np.zeros(0, np.int64)]),
            counts_B=lengths_B - 1,
        )


@torch.no_grad()
def rank_fully(
    model, table, dataset, ranks, config, split, advance=None, workers=None
) -> FullRanking:
    """Ranks every user of a split. Called on all ranks. config: the RunConfig; workers: see `ready`.

    advance(done, total): called after every step.
    """
    where = dataset, ranks.rank, ranks.world_size
    how = {"stream": config.stream, "both_views": config.model.predicts_by_both}
    batches = HeldBatches(
        *where, config.evaluation, config.model.max_length, split, config.seed, **how
    )
    domains = dataset.domains
    rankings = [ExactRanking(table, domain.start, domain.items) for domain in domains]
    popularity = Popularity(dataset, config.seed)
    means = GroupMeans(2, len(domains) * groups_of_domain(), config.seed)
    shown, rank_U = (
        np.zeros(dataset.num_embeddings, np.int64),
        np.zeros(dataset.users, np.int32),
    )
    skipped, reasons = 0, {}
    for done, held in enumerate(
        ready(batches, config.stream, pin_memory=False, workers=workers), start=1
    ):
        skipped += held.skipped
        reasons |= dict.fromkeys(held.reasons)
        query = move(held.query, ranks.device)
        y_BDR = model(query, table(query.ids))[
            : len(held.user_B)
        ]  # a rank without users has one to look up with
        excluded = Excluded(
            torch.from_numpy(held.rows_E.astype(np.int64)),
            torch.from_numpy(held.counts_B),
        )
        rank_B = np.zeros(len(held.user_B), np.int64)
        for number, ranking in enumerate(rankings):
            if batches.alone not in (None, number):
                continue
            y_BR = y_BDR[:, number]
            rows_Bk = (
                ranking.top_k(y_BR, min(SHOWN, domains[number].items), excluded)
                .rows_Bk.cpu()
                .numpy()
            )
            np.add.at(
                shown, rows_Bk[rows_Bk >= 0], 1
            )  # there are few of them beside the rows of M
            own_B = held.domain_B == number
            own = torch.from_numpy(own_B)
            own_excluded = Excluded(
                excluded.rows_E[torch.from_numpy(np.repeat(own_B, held.counts_B))],
                excluded.counts_B[own],
            )
            found = ranking.ranks(
                y_BR[own.to(y_BR.device)],
                torch.from_numpy(held.row_B)[own],
                own_excluded,
            )
            rank_B[own_B] = found.cpu().numpy()
        rank_U[held.user_B] = rank_B
        groups_BG = groups(held, popularity.third[held.row_B])
        means.add(held.user_B, groups_BG, (rank_B, popularity.ranks(held)))
        if advance is not None:
            advance(done, len(batches))
    means.reduce(ranks.device)
    skipped_1 = np.array([skipped])
    for values in (shown, skipped_1):
        _sum_in_place(values, ranks.device)
    return FullRanking(
        summed(rank_U, ranks), means, shown, int(skipped_1[0]), tuple(reasons)
    )


def _sum_in_place(values_M, device):
    """Makes an array the sum of all ranks' arrays, a piece at a time."""
    for begin in range(0, len(values_M), _PIECE):
        piece = torch.from_numpy(values_M[begin : begin + _PIECE])
        total = piece.to(device)
        dist.all_reduce(total)
        piece.copy_(total)


def summed(values_U, ranks):
    """The sum over all ranks of int32 (U,): of what each knows of its own users, everyone's."""
    total_U = torch.from_numpy(values_U).to(ranks.device)
    dist.all_reduce(total_U)
    return total_U.cpu().numpy()


def groups_of_domain():
    """All users, and the groups of each breakdown."""
    return 1 + sum(map(len, BREAKDOWNS.values()))


def groups(held: Held, third_B):
    """The numbers of each user's groups, int64 (B, 1 + BREAKDOWNS)."""
    first_B = held.domain_B * groups_of_domain()
    length_B = np.searchsorted(LENGTHS, held.length_B, side="right") - 1
    places = (third_B, length_B, (held.own_B > 0).astype(np.int64))
    columns, begin = [first_B], 1
    for place_B, names in zip(places, BREAKDOWNS.values(), strict=True):
        columns.append(first_B + begin + place_B)
        begin += len(names)
    return np.stack(columns, 1)


class Popularity:
    """Training interactions of each row, the ranks that they give, and `third`: whether an item is among the most popular ones
    that have a third of their domain's interactions (0), the next that have another (1), or the rest (2)."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed
        self.counts = item_counts(dataset)
        self.third = np.full(dataset.num_embeddings, 2, np.int8)
        self._sorted = []
        for domain in dataset.domains:
            counts = self.counts[domain.start : domain.start + domain.items]
            order = np.argsort(-counts, kind="stable")
            falling = counts[order]
            before = np.cumsum(falling) - falling
            third = np.minimum(2, 3 * before // max(1, counts.sum()))
            self.third[domain.start + order] = np.where(falling > 0, third, 2)
            self._sorted.append(falling[::-1])

    def ranks(self, held: Held):
        """The 1-based rank of each user's held-out item, int64 (B,)."""
        user_E = np.repeat(np.arange(len(held.user_B)), held.counts_B)
        rows = self.dataset.num_embeddings
        pair = np.unique(user_E * rows + held.rows_E)
        user_E, row_E = np.divmod(pair, rows)
        other_E = (self.dataset.domain_of(row_E) == held.domain_B[user_E]) & (
            row_E != held.row_B[user_E]
        )
        user_E, count_E = user_E[other_E], self.counts[row_E[other_E]]
        own_B = self.counts[held.row_B].astype(np.int64)
        greater_B, equal_B = np.zeros_like(own_B), np.zeros_like(own_B)
        for number, ascending in enumerate(self._sorted):
            own = held.domain_B == number
            right = np.searchsorted(ascending, own_B[own], side="right")
            greater_B[own] = len(ascending) - right
            equal_B[own] = (
                right - np.searchsorted(ascending, own_B[own], side="left") - 1
            )
        greater_B -= np.bincount(user_E[count_E > own_B[user_E]], minlength=len(own_B))
        equal_B -= np.bincount(user_E[count_E == own_B[user_E]], minlength=len(own_B))
        return (
            1
            + greater_B
            + random_below(
                random_bits(self.seed, RandomStream.POSITION_TIES, held.user_B),
                equal_B + 1,
            )
        )


def full_record(kind, dataset, ranking: FullRanking, sampled=None, **where):
    """What a run prints and writes of a full ranking; sampled: the record of the sampled one, which stands beside."""
    means, size = ranking.means, groups_of_domain()
    firsts = [number * size for number in range(len(dataset.domains))]
    record = {
        "kind": kind,
        "ranking": "full",
        "too_short": dataset.too_short,
        "skipped_users": ranking.skipped_users,
        **where,
    }
    for system, name in enumerate(("domains", "popularity")):
        record[name] = {
            d.name: means.figures(system, first)
            for d, first in zip(dataset.domains, firsts, strict=True)
        }
        record["mean" if system == 0 else "popularity_mean"] = means.mean(
            system, firsts
        )
    record["difference"] = {
        "metric": HEADLINE,
        "domains": {
            d.name: means.difference(first, HEADLINE)
            for d, first in zip(dataset.domains, firsts, strict=True)
        },
        "mean": means.mean_difference(firsts, HEADLINE),
    }
    record["breakdown"] = {
        d.name: _breakdown(means, first)
        for d, first in zip(dataset.domains, firsts, strict=True)
    }
    record["recommended"] = {
        d.name: recommended(ranking.shown[d.start : d.start + d.items]) for d in dataset.domains
    }  # fmt: skip
    return record | ({"sampled": sampled} if sampled else {})


def _breakdown(means, first):
    found, place = {}, first + 1
    for breakdown, names in BREAKDOWNS.items():
        found[breakdown] = {}
        for name in names:
            popularity = means.figures(1, place)
            found[breakdown][name] = means.figures(0, place) | {
                f"popularity {HEADLINE}": popularity[HEADLINE]
            }
            place += 1
    return found


def recommended(counts_N) -> dict:
    """items: of the domain; coverage: the share of them that anybody is shown; gini: of how often each is shown, 0 where all
    are as often, towards 1 where few take all; None where nobody is shown anything."""
    items, total = len(counts_N), int(counts_N.sum())
    name = f"@{SHOWN}"
    if total == 0:
        return {"items": items, f"coverage{name}": None, f"gini{name}": None}
    ascending = np.sort(counts_N).astype(np.float64)
    gini = float(
        (2 * np.arange(1, items + 1) - items - 1) @ ascending / (items * total)
    )
    return {
        "items": items,
        f"coverage{name}": float(np.count_nonzero(counts_N) / items),
        f"gini{name}": gini,
    }
