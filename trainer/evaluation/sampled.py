"""Ranking of held-out items among drawn candidates: HR, NDCG and MRR by domain (section 5.2.2).

Whose event is held out says the dataset's split (trainer/data/split.py): by leave-one-out the
newest of a user's merged history is the test item, the one before it the validation item. The item
is ranked among items of its own domain that the user never touched (negative sampling). Its
position is an integer, and what is summed over processes are counts of positions. So on CPUs the
figures do not depend on the number of processes; on CUDA near ties may (docs/cuda.md). Ties count
against the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from syncrec.batch.build import build_query
from syncrec.batch.views import Query, move
from trainer.config.evaluation import EvaluationConfig
from trainer.config.run import RunConfig
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.format.vocabulary import read_item_counts
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import Histories, UserHistories
from trainer.data.loading.jagged import row_begins
from trainer.data.loading.negative_sampling import draw_evaluation_negatives
from trainer.data.loading.stream import (
    DamageLog,
    batches_of_workers,
    find_domains,
)
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
from trainer.evaluation.metrics import (
    METRICS,
    Figures,
    candidate_positions,
    count_positions,
    domains_of_mean,
    mean_figures,
    metrics_of_histogram,
    user_mean_figures,
)
from trainer.evaluation.popularity import candidate_scores
from trainer.evaluation.recency.ranking import RecencyPopularity
from trainer.evaluation.recency.term import RecencyTerm
from trainer.evaluation.targets import (
    Targets,
    count_targets,
    count_too_short,
    describe_part,
    describe_unseen,
    find_targets,
    name_by_domain,
)

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks


# (query, rows) to (B, D, R).
Model = Callable[[Query, torch.Tensor], torch.Tensor]
# {user: (domain, rows of M)}.
CandidatesByUser = Mapping[int, tuple[int, np.ndarray]]
# Called with (steps done, steps in all).
Advance = Callable[[int, int], object]


@dataclass(frozen=True)
class Candidates:
    """Users to be ranked in one step of one process: a model's input, and what it is to score.

    user_B: user numbers, −1 for a place that only keeps the processes in step. domain_B: of the
    held-out item. now_B: the ticks as of which the recent past is counted, int64: those for which is
    predicted, or the cut of a split by time. counts_B: candidates of each user,
    the held-out item first. rows_C: their rows of M. skipped, reasons: users who could not be read,
    and why, as in `RankBatch` (trainer.data.loading.stream). target_B: the targets' numbers
    (trainer/evaluation/targets.py); a user may have several, each a place here. None: the users'
    numbers.

    Four users, two of each domain, with two negatives each; domain 1 begins at row 50:

        user_B      12        40         7         31
        domain_B    0         1          1         0
        now_B       700       90         65000     700
        counts_B    3         3          3         3
        rows_C      4 9 2     51 60 55   58 52 61  9 17 3
    """

    query: Query
    user_B: np.ndarray
    domain_B: np.ndarray
    now_B: np.ndarray
    counts_B: np.ndarray
    rows_C: np.ndarray
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    target_B: np.ndarray | None = None

    @property
    def number_B(self) -> np.ndarray:
        """The targets' numbers, int64 (B,)."""
        return self.user_B if self.target_B is None else self.target_B

    @property
    def held_out_row_B(self) -> np.ndarray:
        """The held-out item of each place, int64 (B,)."""
        return self.rows_C[row_begins(self.counts_B)]


@dataclass(frozen=True)
class PositionCounts:
    """How often each position occurred in a split, summed over all processes.

    histogram: int64 (S, D, longest candidate list), position 1 first, by each of `systems`, of the
    targets whose item training has seen: by leave-one-out of all. unseen: likewise, of the others.
    skipped_users: users that could not be read, whether or not they would have been evaluated.
    reasons: why, of this process alone, each line once.
    recency_choice, recency_term: the half-life of recency popularity and the weights of the recency
    term, where they are among the systems.

    Four users, two in each of two domains, among three candidates:

        histogram[0]    [[1, 1, 0],    by the model: of domain 0 one user first, one second
                         [2, 0, 0]]    of domain 1 both first
        histogram[1]    [[0, 0, 2],    by popularity
                         [0, 1, 1]]
    """

    histogram: np.ndarray
    skipped_users: int = 0
    reasons: tuple[str, ...] = ()
    unseen: np.ndarray | None = None
    systems: tuple[str, ...] = (MODEL, POPULARITY)
    recency_choice: dict[str, Any] | None = None
    recency_term: dict[str, Any] | None = None


# Positions of the held-out items by system, int64 (B,) each.
Positions = Mapping[str, np.ndarray]
# Called with (…, positions, scores_C), the model's scores.
Visit = Callable[[Candidates, Positions, np.ndarray], None]


class RankingBatches(torch.utils.data.IterableDataset[Any]):
    """Every target of a part of the split, once, in the same number of batches on every rank.

    Each user is ranked by its home rank, whose shards hold it. A rank that has no target in a step
    gives a batch of one place, user −1, so that all ranks take part in the look-up of the table.
    Where users have several targets, a step has several batches, as many as the rank needs that has
    most targets.
    """

    def __init__(
        self,
        dataset: Dataset,
        rank: int,
        world_size: int,
        config: EvaluationConfig,
        max_length: int,
        split: str,
        seed: int,
        candidates: CandidatesByUser | None = None,
        stream: StreamConfig | None = None,
        both_views: bool = False,
    ):
        """split: the part, "validation" or "test". candidates: {user number: (domain, rows)}, the
        held-out item first, in place of drawn candidates; users without an entry are left out.
        stream: its `verify`, `damaged` and `domain` count. both_views: as the model predicts.
        """
        super().__init__()
        self.stream = stream or StreamConfig()
        # Each user stays on its home rank: candidates are most of the work, and as many for each.
        global_batch_size = config.batch_size * world_size
        self.plan = BatchSchedule(
            dataset,
            global_batch_size,
            world_size,
            seed,
            shuffle=False,
            balance=False,
        )
        self.rank = rank
        self.config = config
        self.max_length = max_length
        self.both_views = both_views
        self.part = split
        self.candidates = candidates
        # The one domain that the model knows, by number.
        self.only_domain = None
        if self.stream.domain:
            self.only_domain = dataset.domain_number(self.stream.domain)

    def __len__(self) -> int:
        steps = self.plan.steps(0)
        if self.plan.dataset.split.one_target:
            return steps
        return sum(self._count_batches(step) for step in range(steps))

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        offset = 0
        stride = 1
        if worker:
            offset = worker.id
            stride = worker.num_workers
        reasons = DamageLog()
        report = reasons if self.stream.damaged == "skip" else None
        histories = Histories.of_schedule(self.plan, self.stream.verify, report)
        try:
            for step in range(offset, self.plan.steps(0), stride):
                wanted_B = self.plan.users(0, step, self.rank)
                users = histories.read(wanted_B)
                skipped = len(wanted_B) - len(users.number_B)
                for batch in self._build_step(step, users):
                    yield replace(
                        batch,
                        skipped=skipped,
                        reasons=reasons.take(),
                    )
                    skipped = 0
        finally:
            histories.close()

    def _build_step(self, step: int, users: UserHistories) -> Iterator[Any]:
        """Yields a step's batches, of at most `batch_size` targets where users have several."""
        if self.plan.dataset.split.one_target:
            yield self.build(users)
            return
        targets = find_targets(self.plan.dataset, self.part, users)
        size = self.config.batch_size
        for batch in range(self._count_batches(step)):
            begin = batch * size
            chosen = targets.choose(slice(begin, begin + size))
            yield self.build(users, chosen)

    def _count_batches(self, step: int) -> int:
        """How many batches a step has on every rank, at least one."""
        user_B, home_B, _ = self.plan.ranks(0, step)
        count_B = count_targets(self.plan.dataset, self.part, user_B)
        targets_W = np.bincount(home_B, weights=count_B)
        most = int(targets_W.max(initial=0))
        return max(1, -(-most // self.config.batch_size))

    def build(
        self, users: UserHistories, targets: Targets | None = None
    ) -> Any:
        """Candidates: histories up to the held-out items, and their candidates.

        targets: of these users; None: all of them.
        """
        if targets is None:
            targets = find_targets(self.plan.dataset, self.part, users)
        ends_B = np.cumsum(users.lengths_B)
        chosen: list[int] = []
        domains: list[int] = []
        now: list[int] = []
        candidates: list[np.ndarray] = []
        pairs = zip(targets.user_T, targets.place_T, strict=True)
        for index, (user, place) in enumerate(pairs):
            end = ends_B[user]
            begin = end - users.lengths_B[user]
            items = users.items_N[begin:end]
            number = int(users.number_B[user])
            pair = self._candidates(number, items, place)
            if pair is None:
                continue
            domain, rows = pair
            chosen.append(index)
            domains.append(domain)
            now.append(int(users.ticks_N[begin + place]))
            candidates.append(rows)
        counted_B = self.plan.dataset.split.counted_until(
            self.part, np.array(now, np.int64)
        )
        ranked = targets.choose(np.array(chosen, np.int64))
        user_B = users.number_B[ranked.user_T]
        target_B = ranked.number_T
        if not chosen:  # this rank takes part in the look-up all the same
            user_B = np.array([-1])
            target_B = np.array([-1])
            domains = [0]
            counted_B = np.zeros(1, np.int64)
            candidates = [np.zeros(1, np.int64)]
        rows_C = np.concatenate(candidates)
        query = self.query(users, ranked, rows_C)
        counts_B = np.array([len(rows) for rows in candidates])
        return Candidates(
            query,
            user_B,
            np.array(domains),
            counted_B,
            counts_B,
            rows_C,
            target_B=target_B,
        )

    def _candidates(
        self, user: int, items: np.ndarray, place: int
    ) -> tuple[int, np.ndarray] | None:
        """(domain, rows) of a user with this history, None where the target is left out.

        place: of the target in the history.
        """
        dataset = self.plan.dataset
        if self.candidates is not None:
            if user not in self.candidates:
                return None
            domain, rows = self.candidates[user]
            if self.only_domain not in (None, domain):
                return None
            return domain, rows
        positive = items[place]
        number = int(dataset.domain_of(positive[None])[0])
        if self.only_domain not in (None, number):
            return None
        own_domain = dataset.domains[number]
        drawn_rows = None
        if dataset.drawn_rows is not None:
            drawn_rows = dataset.drawn_rows[number]
        negatives = draw_evaluation_negatives(
            self.plan.seed,
            user,
            items,
            own_domain.start,
            own_domain.items,
            self.config.negatives,
            drawn_rows,
        )
        return number, np.append(positive, negatives)

    def query(
        self,
        users: UserHistories,
        targets: Targets,
        extra_ids: np.ndarray,
    ) -> Query:
        """The Query of some users' histories up to their targets, for the targets' time.

        Where a model was trained on one domain alone, that
        domain's interactions alone. Without users it has one empty history, as a rank without
        users takes part in the look-up.
        """
        dataset = self.plan.dataset
        ends_B = np.cumsum(users.lengths_B)
        item_parts: list[np.ndarray] = []
        tick_parts: list[np.ndarray] = []
        now_B: list[int] = []
        pairs = zip(targets.user_T, targets.place_T, strict=True)
        for user, place in pairs:
            begin = ends_B[user] - users.lengths_B[user]
            end = begin + place
            items = users.items_N[begin:end]
            ticks = users.ticks_N[begin:end]
            if self.only_domain is not None:
                of_domain = dataset.domain_of(items) == self.only_domain
                items = items[of_domain]
                ticks = ticks[of_domain]
            item_parts.append(items)
            tick_parts.append(ticks)
            now_B.append(users.ticks_N[end])
        if not item_parts:
            item_parts.append(np.zeros(0, np.int64))
            tick_parts.append(np.zeros(0, np.int64))
            now_B.append(0)
        lengths_B = np.array([len(items) for items in item_parts])
        return build_history_query(
            dataset,
            np.concatenate(item_parts),
            np.concatenate(tick_parts),
            lengths_B,
            np.array(now_B),
            self.max_length,
            extra_ids,
            self.both_views,
        )

    def longest_list(self) -> int:
        """Candidates of the user with most of them, of all ranks' users."""
        if self.candidates is None:
            return 1 + self.config.negatives
        # Each rank may have been given its own users' candidates, which know the longest of all.
        longest = getattr(self.candidates, "longest", None)
        if longest:
            return longest
        lengths = [len(rows) for _, rows in self.candidates.values()]
        return max(lengths, default=1)


def build_history_query(
    dataset: Dataset,
    items_N: np.ndarray,
    ticks_N: np.ndarray,
    lengths_B: np.ndarray,
    now_B: np.ndarray,
    max_length: int,
    extra_ids: np.ndarray,
    both_views: bool,
) -> Query:
    """A Query of histories for some times (ticks), with the views that a model predicts by.

    items_N, ticks_N, lengths_B: jagged, user after user, oldest first. now_B: the ticks for which
    is predicted. extra_ids: rows that are looked up too. Four users of two domains, of which the
    third has no history:

        lengths_B    2        3           0    1
        items_N      4 51     9 60 2           58
        ticks_N      10 20    5 5 90           7
        now_B        30       95          0    8
    """
    domain_N = None
    if both_views:
        domain_N = find_domains(dataset, items_N)
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
    model: Model,
    table: "ItemTable",
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    split: str,
    candidates: CandidatesByUser | None = None,
    visit: Visit | None = None,
    advance: Advance | None = None,
    workers: int | None = None,
    recency: RecencyPopularity | None = None,
    term: RecencyTerm | None = None,
) -> PositionCounts:
    """Ranks every user of a split, as `rank_candidates` does. Called on all ranks.

    candidates: as `RankingBatches` takes them. workers: as `ready` takes them.
    """
    batches = RankingBatches(
        dataset,
        ranks.rank,
        ranks.world_size,
        config.evaluation,
        config.model.max_length,
        split,
        config.seed,
        candidates,
        config.stream,
        config.model.predicts_by_both,
    )
    built = batches_of_workers(
        batches,
        config.stream,
        pin_memory=False,
        workers=workers,
    )
    return rank_candidates(
        model,
        table,
        batches,
        built,
        ranks.device,
        visit,
        advance,
        recency,
        term,
    )


@torch.no_grad()
def rank_candidates(
    model: Model,
    table: "ItemTable",
    batches: RankingBatches,
    built: Iterable[Candidates],
    device: torch.device,
    visit: Visit | None = None,
    advance: Advance | None = None,
    recency: RecencyPopularity | None = None,
    term: RecencyTerm | None = None,
) -> PositionCounts:
    """Ranks the candidates of every step that `built` brings. Called on all ranks.

    model: takes (Query, rows) and gives (B, D, R). visit(candidates, positions, scores_C): called
    for every step of this process. advance(done, total): called after every step. recency, term:
    recency popularity, and what adds to the model's scores: they rank beside the model and
    popularity.
    """
    dataset = batches.plan.dataset
    others = _OtherSystems(dataset, batches.plan.seed, recency, term)
    systems = (MODEL, *others.names)
    shape = (2, len(systems), len(dataset.domains), batches.longest_list())
    # Of seen items, and of unseen ones.
    histograms = np.zeros(shape, np.int64)
    skipped = 0
    reasons: dict[str, None] = {}
    for done, candidates in enumerate(built, start=1):
        skipped += candidates.skipped
        reasons |= dict.fromkeys(candidates.reasons)
        scores_C = _model_scores(model, table, candidates, device)
        positions = {
            MODEL: candidate_positions(scores_C, candidates.counts_B),
            **others.positions(candidates, scores_C),
        }
        is_seen_B = dataset.is_trained(candidates.held_out_row_B)
        _count_step(histograms[0], candidates, positions, is_seen_B)
        _count_step(histograms[1], candidates, positions, ~is_seen_B)
        if visit is not None:
            visit(candidates, positions, scores_C)
        if advance is not None:
            advance(done, len(batches))
    counts = np.append(histograms.ravel(), skipped)
    total = torch.from_numpy(counts).to(device)
    dist.all_reduce(total)
    counts = total.cpu().numpy()
    histograms = counts[:-1].reshape(shape)
    return PositionCounts(
        histogram=histograms[0],
        skipped_users=int(counts[-1]),
        reasons=tuple(reasons),
        unseen=histograms[1],
        systems=systems,
        recency_choice=None if recency is None else recency.choice.to_record(),
        recency_term=None if term is None else term.to_record(dataset),
    )


def _count_step(
    histogram_SDP: np.ndarray,
    candidates: Candidates,
    positions: Positions,
    chosen_B: np.ndarray,
) -> None:
    """Adds the positions of some of a step's users, system after system."""
    chosen_B = chosen_B & (candidates.user_B >= 0)
    domain_B = candidates.domain_B[chosen_B]
    for histogram_DP, position_B in zip(
        histogram_SDP, positions.values(), strict=True
    ):
        count_positions(histogram_DP, domain_B, position_B[chosen_B])


class _OtherSystems:
    """What ranks the same candidates beside the model."""

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        recency: RecencyPopularity | None,
        term: RecencyTerm | None,
    ) -> None:
        self._counts_N = read_item_counts(dataset)
        self._seed = seed
        self._recency = recency
        self._term = term

    @property
    def names(self) -> tuple[str, ...]:
        """Their keys in a record."""
        names = [POPULARITY]
        if self._recency is not None:
            names.append(RECENCY)
        if self._term is not None:
            names.append(WITH_RECENCY)
        return tuple(names)

    def positions(
        self, candidates: Candidates, scores_C: np.ndarray
    ) -> Positions:
        """The positions of the held-out items by each of them. scores_C: the model's."""
        positions = {}
        scores = self.scores(candidates, scores_C)
        for name, score_C in zip(self.names, scores, strict=True):
            positions[name] = candidate_positions(score_C, candidates.counts_B)
        return positions

    def scores(
        self, candidates: Candidates, scores_C: np.ndarray
    ) -> list[np.ndarray]:
        """The candidates' scores by each of them, (C,), in the order of `names`."""
        user_B = candidates.user_B
        counts_B = candidates.counts_B
        rows_C = candidates.rows_C
        scores = [
            candidate_scores(
                self._counts_N, self._seed, user_B, counts_B, rows_C
            )
        ]
        if self._recency is not None:
            recency_C = self._recency.candidate_scores(
                user_B, candidates.now_B, counts_B, rows_C
            )
            scores.append(recency_C)
        if self._term is not None:
            with_term_C = self._term.scores(
                candidates.domain_B,
                candidates.now_B,
                counts_B,
                rows_C,
                scores_C,
            )
            scores.append(with_term_C)
        return scores


def _model_scores(
    model: Model,
    table: "ItemTable",
    candidates: Candidates,
    device: torch.device,
) -> np.ndarray:
    """The model's score of each candidate, float32 (C,).

    It is the dot product of the candidate's vector with the user's vector for the domain of the
    held-out item. Two users with three and two candidates:

        domain_B    0                   1
        counts_B    3                   2
        y_BR        y[0, 0]             y[1, 1]
        user_C      0    0    0         1    1
    """
    query = move(candidates.query, device)
    rows = table(query.ids)
    y_BDR = model(query, rows)
    domain_B = torch.from_numpy(candidates.domain_B)
    user_B = torch.arange(len(y_BDR))
    y_BR = y_BDR[user_B, domain_B]
    counts_B = torch.from_numpy(candidates.counts_B).to(device)
    index_B = torch.arange(len(counts_B), device=device)
    user_C = torch.repeat_interleave(index_B, counts_B)
    candidates_CR = rows[query.interactions :]
    products_CR = y_BR[user_C] * candidates_CR
    scores_C = products_CR.sum(1).float()
    return scores_C.cpu().numpy()


def count_users(dataset: Dataset, ranking: PositionCounts) -> dict[str, int]:
    """Evaluated users of all processes, by domain."""
    users = {}
    for number, domain in enumerate(dataset.domains):
        users[domain.name] = int(ranking.histogram[0, number].sum())
    return users


def evaluation_of(
    split: str,
    dataset: Dataset,
    ranking: PositionCounts,
    *,
    min_users: int = 1,
    mean_domains: Sequence[str] | None = None,
    **model_state: Any,
) -> Evaluation:
    """The figures by domain and their means. model_state: `step`, `epoch` and the like.

    min_users: of a domain that counts in the mean over domains (`evaluation.min_users`), by the
    users of all processes. mean_domains: the domains that count, whatever their users are.
    """
    by_system: dict[str, dict[str, Figures]] = {}
    for system, histogram_DP in zip(
        ranking.systems, ranking.histogram, strict=True
    ):
        by_system[system] = _figures_by_domain(dataset, histogram_DP)
    model_figures = by_system.pop(MODEL)
    if mean_domains is None:
        users = count_users(dataset, ranking)
        mean_domains = domains_of_mean(users, min_users)
    rows = []
    for name, figures in model_figures.items():
        beside = {}
        for system in COMPARED:
            beside[system] = by_system.get(system, {}).get(name, {})
        rows.append(DomainFigures(name, figures, **beside))
    compared = {}
    for system, of_system in by_system.items():
        mean = mean_figures(of_system, mean_domains)
        compared[system] = ComparedMeans(mean, user_mean_figures(of_system))
    return Evaluation(
        kind=split,
        by_domain=DomainTable(rows, METRICS),
        mean=mean_figures(model_figures, mean_domains),
        compared=compared,
        too_short=count_too_short(dataset),
        skipped_users=ranking.skipped_users,
        split=describe_part(dataset, split),
        unseen=_unseen_figures(dataset, ranking),
        model_state=model_state,
        recorded_domains=tuple(mean_domains),
        min_users=min_users,
        recorded_user_mean=user_mean_figures(model_figures),
        recency_choice=ranking.recency_choice,
        recency_term=ranking.recency_term,
    )


def _figures_by_domain(
    dataset: Dataset, histogram_DP: np.ndarray
) -> dict[str, Figures]:
    """{domain: figures} of counts of positions."""
    figures = [metrics_of_histogram(counts_P) for counts_P in histogram_DP]
    return name_by_domain(dataset, figures)


def _unseen_figures(
    dataset: Dataset, ranking: PositionCounts
) -> dict[str, Any] | None:
    """The figures of targets whose item training has not seen; None of leave-one-out."""
    if dataset.training is None or ranking.unseen is None:
        return None
    by_system: dict[str, dict[str, Figures]] = {}
    for system, histogram_DP in zip(
        ranking.systems, ranking.unseen, strict=True
    ):
        by_system[system] = _figures_by_domain(dataset, histogram_DP)
    return describe_unseen(dataset, by_system)


def make_evaluation_record(
    kind: str, dataset: Dataset, ranking: PositionCounts, **where: Any
) -> dict[str, Any]:
    """The record of `evaluation_of`, which a run writes and prints. kind: the split.

    where: what `evaluation_of` takes by name.
    """
    evaluation = evaluation_of(kind, dataset, ranking, **where)
    return evaluation.to_record()
