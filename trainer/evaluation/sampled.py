"""Ranking of held-out items among candidates: HR, NDCG and MRR by domain (section 5.2.2).

The newest interaction of a user's merged history is the test item, the one before it the validation item; the item is
ranked among items of its own domain that the user never touched. A result is an integer rank, and what is summed over
ranks are counts of them: on CPUs the figures do not depend on the number of processes; on CUDA near ties
may (docs/gpu.md). Ties count against the model.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from syncrec.batch.build import Query, build_query, move
from trainer.config.evaluation import EvaluationConfig
from trainer.config.stream import StreamConfig
from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.data.format.dataset import SPLIT_LENGTH
from trainer.data.format.vocabulary import item_counts
from trainer.data.loading.batch_schedule import Plan
from trainer.data.loading.histories import Histories, Users
from trainer.data.loading.negative_sampling import evaluation_negatives
from trainer.data.loading.stream import Reasons, domains_of, ready

METRICS = ("HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")


@dataclass(frozen=True)
class Candidates:
    """Users to be ranked in one step of one rank: a model's input, and what it is to score.

    user_B: user numbers, −1 for a place that only keeps the ranks in step; domain_B; counts_B: candidates of each user, the
    held-out item first; rows_C: their rows of M. skipped, reasons: who could not be read, as in Fed (trainer.data.loading.stream).
    """

    query: Query
    user_B: np.ndarray
    domain_B: np.ndarray
    counts_B: np.ndarray
    rows_C: np.ndarray
    skipped: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """What ranking a split gives, summed over all processes.

    histogram: how often each rank occurred, rank 1 first, by the model and by popularity: int64 (2, D, longest candidate
    list). skipped_users: users that could not be read, whether or not they would have been evaluated. reasons: why, of
    this process alone, each line once.
    """

    histogram: np.ndarray
    skipped_users: int = 0
    reasons: tuple[str, ...] = ()


class RankingBatches(torch.utils.data.IterableDataset):
    """Every user of the dataset that can be split, once, in the same steps on every rank.

    split: "validation" or "test". given: {user number: (domain, rows)}, the held-out item first, instead of drawn
    candidates; users without an entry are left out. stream: `verify`, `damaged` and `domain` are heeded. both_views: as the
    model predicts.
    """

    def __init__(
        self,
        dataset,
        rank,
        world_size,
        config: EvaluationConfig,
        max_length,
        split,
        seed,
        given=None,
        stream=None,
        both_views=False,
    ):
        super().__init__()
        self.stream = stream or StreamConfig()
        # Each user on its home rank: candidates are most of the work, and as many for each.
        of_all_ranks = config.batch_size * world_size
        self.plan = Plan(
            dataset, of_all_ranks, world_size, seed, shuffle=False, balance=False
        )
        self.rank, self.config, self.max_length, self.both_views = (
            rank,
            config,
            max_length,
            both_views,
        )
        self.back = {"test": 1, "validation": 2}[split]
        self.given = given
        self.alone = (
            dataset.domain_number(self.stream.domain) if self.stream.domain else None
        )

    def __len__(self):
        return self.plan.steps(0)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        reasons = Reasons()
        histories = Histories.of_plan(
            self.plan,
            self.stream.verify,
            reasons if self.stream.damaged == "skip" else None,
        )
        try:
            for step in range(offset, self.plan.steps(0), stride):
                wanted_B = self.plan.users(0, step, self.rank)
                users = histories.read(wanted_B)
                skipped = len(wanted_B) - len(users.number_B)
                yield replace(
                    self.build(users), skipped=skipped, reasons=reasons.take()
                )
        finally:
            histories.close()

    def query(self, users, user_B, extra_ids):
        """The Query of the histories of some of the `users`, by their places, up to the held-out item and for its time; without
        any, one that is empty: a rank without users takes part in the look-up. Of the one domain where a model is trained on
        that alone.
        """
        dataset, ends_B = self.plan.dataset, np.cumsum(users.lengths_B)
        histories, now_B = (
            [(np.zeros(0, np.int64), np.zeros(0, np.int64))] * (not len(user_B)),
            [0] * (not len(user_B)),
        )
        for user in user_B:
            end = ends_B[user] - self.back
            own = slice(ends_B[user] - users.lengths_B[user], end)
            items, ticks = users.items_N[own], users.ticks_N[own]
            if self.alone is not None:
                here = dataset.domain_of(items) == self.alone
                items, ticks = items[here], ticks[here]
            histories.append((items, ticks))
            now_B.append(users.ticks_N[end])
        items_N, ticks_N = map(np.concatenate, zip(*histories, strict=True))
        lengths_B = np.array([len(items) for items, _ in histories])
        return query_of(
            dataset,
            items_N,
            ticks_N,
            lengths_B,
            np.array(now_B),
            self.max_length,
            extra_ids,
            self.both_views,
        )

    def build(self, users: Users) -> Candidates:
        """Histories up to the held-out item, and its candidates."""
        dataset = self.plan.dataset
        ends = np.cumsum(users.lengths_B)
        asked, numbers, domains, candidates = [], [], [], []
        for user, (number, length, end) in enumerate(
            zip(users.number_B, users.lengths_B, ends, strict=True)
        ):
            if length < SPLIT_LENGTH:
                continue
            items = users.items_N[end - length : end]
            positive = items[-self.back]
            domain = int(dataset.domain_of(positive[None])[0])
            if self.given is not None:
                if int(number) not in self.given:
                    continue
                domain, rows = self.given[int(number)]
            if self.alone not in (None, domain):
                continue
            if self.given is None:
                own = dataset.domains[domain]
                seed, count = self.plan.seed, self.config.negatives
                negatives = evaluation_negatives(
                    seed, int(number), items, own.start, own.items, count
                )
                rows = np.append(positive, negatives)
            asked.append(user)
            numbers.append(number)
            domains.append(domain)
            candidates.append(rows)
        if not asked:  # this rank takes part in the look-up all the same
            numbers, domains, candidates = [-1], [0], [np.zeros(1, np.int64)]
        rows_C = np.concatenate(candidates)
        query = self.query(users, asked, rows_C)
        counts_B = np.array([len(rows) for rows in candidates])
        return Candidates(query, np.array(numbers), np.array(domains), counts_B, rows_C)


def query_of(
    dataset, items_N, ticks_N, lengths_B, now_B, max_length, extra_ids, both_views
):
    """A Query of histories for some times (ticks), with the views that a model predicts by."""
    domain_N = domains_of(dataset, items_N) if both_views else None
    return build_query(
        items_N,
        lengths_B,
        max_length,
        extra_ids,
        domain_N,
        len(dataset.domains),
        ticks_N,
        now_B,
    )


def evaluate_split(
    model,
    table,
    dataset,
    ranks,
    config,
    split,
    given=None,
    visit=None,
    advance=None,
    workers=None,
):
    """The Ranking of every user of a split, as `rank_candidates` gives it. config: the RunConfig; workers: see `ready`."""
    where = dataset, ranks.rank, ranks.world_size
    what = (
        config.evaluation,
        config.model.max_length,
        split,
        config.seed,
        given,
        config.stream,
        config.model.predicts_by_both,
    )
    batches = RankingBatches(*where, *what)
    built = ready(batches, config.stream, pin_memory=False, workers=workers)
    return rank_candidates(model, table, batches, built, ranks.device, visit, advance)


@torch.no_grad()
def rank_candidates(
    model, table, batches, built, device, visit=None, advance=None
) -> Ranking:
    """Ranks what `built` brings, on all processes.

    model: takes (Query, rows) and gives (B, D, r); table: ItemTable. visit(candidates, ranks_B, scores_C): called for every
    step of this process. advance(done, total): called after every step.
    """
    dataset = batches.plan.dataset
    popularity = item_counts(dataset)
    longest = 1 + batches.config.negatives
    if batches.given is not None:
        # Of all ranks' users, where each rank has been given its own.
        longest = getattr(batches.given, "longest", None) or max(
            (len(rows) for _, rows in batches.given.values()), default=1
        )
    histogram = np.zeros((2, len(dataset.domains), longest), np.int64)
    skipped, reasons = 0, {}
    for done, candidates in enumerate(built, start=1):
        skipped += candidates.skipped
        reasons |= dict.fromkeys(candidates.reasons)
        query = move(candidates.query, device)
        rows = table(query.ids)
        y_BDR = model(query, rows)
        y_BR = y_BDR[torch.arange(len(y_BDR)), torch.from_numpy(candidates.domain_B)]
        counts = torch.from_numpy(candidates.counts_B).to(device)
        users_C = torch.repeat_interleave(
            torch.arange(len(counts), device=device), counts
        )
        scores_C = (
            (y_BR[users_C] * rows[query.interactions :]).sum(1).float().cpu().numpy()
        )
        ranks_B = _ranks(scores_C, candidates.counts_B)
        real = candidates.user_B >= 0
        by_popularity_B = _ranks(
            _popularity_scores(popularity, candidates, batches.plan.seed),
            candidates.counts_B,
        )
        for system, ranks in enumerate((ranks_B, by_popularity_B)):
            np.add.at(
                histogram[system], (candidates.domain_B[real], ranks[real] - 1), 1
            )
        if visit is not None:
            visit(candidates, ranks_B, scores_C)
        if advance is not None:
            advance(done, len(batches))
    total = torch.from_numpy(np.append(histogram, skipped)).to(device)
    dist.all_reduce(total)
    *counts, skipped = total.tolist()
    return Ranking(
        np.array(counts, np.int64).reshape(histogram.shape), skipped, tuple(reasons)
    )


def _popularity_scores(popularity, candidates, seed):
    """Training interactions of each candidate; equal counts in a random order that is fixed by (seed, user, item), since
    counting ties against so coarse a score would make the opponent weaker than it is."""
    users_C = np.repeat(candidates.user_B, candidates.counts_B)
    return popularity[candidates.rows_C] + random_unit(
        random_bits(seed, RandomStream.POPULARITY_TIES, users_C, candidates.rows_C)
    )


def _ranks(scores_C, counts_B):
    """The 1-based rank of each user's first candidate; equal scores, and scores that are no numbers, count against it."""
    starts = np.cumsum(counts_B) - counts_B
    first_C = np.repeat(scores_C[starts], counts_B)
    beaten_C = first_C > scores_C
    return counts_B - np.add.reduceat(beaten_C.astype(np.int64), starts)


def figures(histogram_R):
    """HR, NDCG and MRR from counts of ranks (rank 1 first), with the number of users; None where there is none."""
    users = int(histogram_R.sum())
    if users == 0:
        return {"users": 0} | dict.fromkeys(METRICS)
    rank = np.arange(1, len(histogram_R) + 1)
    gain, share = 1 / np.log2(rank + 1), histogram_R / users
    return {
        "users": users,
        "HR@5": float(share[:5].sum()),
        "HR@10": float(share[:10].sum()),
        "NDCG@5": float((share * gain)[:5].sum()),
        "NDCG@10": float((share * gain)[:10].sum()),
        "MRR": float((share / rank).sum()),
    }


def evaluation_record(kind, dataset, ranking: Ranking, **where):
    """What a run writes and prints of one evaluation: figures by domain and their mean over domains with users."""
    record = {
        "kind": kind,
        "too_short": dataset.too_short,
        "skipped_users": ranking.skipped_users,
        **where,
    }
    for system, name in enumerate(("domains", "popularity")):
        by_domain = {
            d.name: figures(ranking.histogram[system, i])
            for i, d in enumerate(dataset.domains)
        }
        seen = [values for values in by_domain.values() if values["users"]]
        mean = {
            metric: float(np.mean([v[metric] for v in seen])) if seen else None
            for metric in METRICS
        }
        record[name], record["mean" if name == "domains" else "popularity_mean"] = (
            by_domain,
            mean,
        )
    return record
