"""Prequential evaluation: a model ranks what came after its own logs, before any model learns from it.

This is the order in which a nightly job serves. All events of the day are ranked, each after everything
that its user did before, earlier events of the day among it. Of a history whose last two events are of
the day:

    history                         a  b  c  |  d  e
    yesterday's model has learnt    a                    b and c were its validation and its test
    ranked                                      d        after a b c
    ranked                                         e     after a b c d

Recency popularity and popularity rank the same candidates beside it. Recency popularity counts what came
before each event's day; popularity is of what the model has learnt from. Events of an item that it has
not learnt from are ranked apart (`unseen`), and nothing else is ranked among such items.

The record is that of an evaluation (trainer/evaluation/evaluation.py) of the kind "arrivals", and

    against_recency    {domain: {system, users, now, before, error}}: NDCG@10 of the model, with its recency
                       term where that is switched on, beside recency popularity's, over the same events,
                       of items that the model has learnt from

or `skipped` alone, which says why nothing was ranked. A. P. Dawid, "Statistical Theory: The Prequential
Approach", 1984.

Legend of shapes: T targets, S systems, U users of a domain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.checkpoint.best_model import (
    TrainedModel,
    load_trained_model,
    open_run,
)
from trainer.checkpoint.load import find_best
from trainer.checkpoint.warm_start import WarmStart, match_model
from trainer.config.run import RunConfig
from trainer.data.format.dataset import TICKS, Dataset
from trainer.data.loading.day_counts import count_recent
from trainer.data.loading.timeline import format_time, hold_out
from trainer.data.split import LEAVE_ONE_OUT, TEST, LeaveOneOut, Timeline
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.determinism import use_deterministic_sums
from trainer.distributed.process_group import sum_over_ranks
from trainer.errors import InputError
from trainer.evaluation.evaluation import (
    MODEL,
    RECENCY,
    WITH_RECENCY,
)
from trainer.evaluation.metrics import metric_values
from trainer.evaluation.recency.stored import open_recency, open_recency_term
from trainer.evaluation.sampled import (
    Candidates,
    Positions,
    evaluate_split,
    make_evaluation_record,
)
from trainer.evaluation.targets import highest_target, users_of_targets
from trainer.files.progress import Stages
from trainer.retraining.day import read_json
from trainer.run_files import EXTENSION, HEADLINE

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

ARRIVALS = "arrivals"  # the record's kind


@dataclass(frozen=True)
class ArrivalSplit(Timeline):
    """Of a model that was trained by leave-one-out: all events after its logs are held out.

    validation_tick: the first after the model's own logs, which it was trained, validated and tested
    on. test_tick: the first after the logs before the newest ones. Between the two are logs that the
    model has not learnt from, and that are not ranked, as a refused day's.

    With both at the tick 60:

        history       a   b   c   d   e
        ticks         10  40  55  70  80
        training      a
        validation        b                 after a
        test                      d   e     after a b c, and after a b c d
    """

    whose: str = "all"
    counts: str = "day"

    def training_lengths(
        self, lengths_B: np.ndarray, ticks_N: np.ndarray
    ) -> np.ndarray:
        """As of leave-one-out on what comes before the model's end, int64 (B,)."""
        before_B = super().training_lengths(lengths_B, ticks_N)
        return LEAVE_ONE_OUT.training_lengths(before_B, ticks_N)

    def _held_out(
        self, part: str, lengths_B: np.ndarray, ticks_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Timeline` has it, with the validation of leave-one-out."""
        if part == TEST.name:
            return super()._held_out(part, lengths_B, ticks_N)
        before_B = super().training_lengths(lengths_B, ticks_N)
        return LEAVE_ONE_OUT.targets(part, before_B, ticks_N)


def score_arrivals(
    run: str | Path,
    ranks: "Ranks",
    data: str | Path | None = None,
    recency_term: bool = False,
) -> dict[str, Any]:
    """Ranks what came with a dataset's newest logs by a run's best model. Called on all ranks.

    data: a dataset with later logs than the run's own. recency_term: rank by the model with its recency
    term too, as `evaluation.recency_term` does. Returns the record that this module describes.

    Raises InputError where run or dataset cannot be used.
    """
    config, dataset = open_run(run, data, of_all_domains=True, ranks=ranks)
    if config.split.kind != LeaveOneOut.name:
        raise InputError(
            f"{run}: has not learnt from its newest days (split.kind={config.split.kind}): "
            "arrivals are ranked by a run of split.kind=leave_one_out"
        )
    folder, _, state = find_best(Path(run), ranks)
    known = match_model(Path(run), folder, state["dataset"], dataset, ranks)
    split = _split_at_end(dataset, known, ranks)
    if isinstance(split, str):
        return {"kind": ARRIVALS, "skipped": split}
    dataset = _hold_out_arrivals(dataset, split, known, config, ranks)
    with use_deterministic_sums(config.deterministic):
        trained = load_trained_model(run, config, dataset, ranks)
        wants_term = recency_term or config.evaluation.recency_term
        return _score(trained, wants_term)


def _split_at_end(
    dataset: Dataset, known: WarmStart, ranks: "Ranks"
) -> ArrivalSplit | str:
    """The split behind what the model and the logs before end with, or why there is none."""
    if dataset.first_time == dataset.last_time:
        return "all events have one time: which of them came later is not known"
    (_, model_end), _ = known.spans
    end = run_on_first_rank(
        lambda: _end_of_logs_before(dataset, model_end), ranks.first
    )
    end = max(end, model_end)
    # No event of the same tick as the last one of before: they are not told apart.
    test_tick = _tick_of(dataset, end) + 1
    if end >= dataset.last_time or test_tick > TICKS:
        return f"no event is later than {format_time(dataset, end)}, where the logs before end"
    return ArrivalSplit(_tick_of(dataset, model_end) + 1, test_tick)


def _tick_of(dataset: Dataset, time: float) -> int:
    """The tick of a time, −1 of one before the dataset's first."""
    if time < dataset.first_time:
        return -1
    return int(dataset.ticks(np.array(time)))


def _end_of_logs_before(dataset: Dataset, model_end: float) -> float:
    """The last time of the dataset that this one extends; the model's where it extends none."""
    file = dataset.folder / EXTENSION / "extension.json"
    if not file.is_file():
        return model_end
    try:
        _, last = read_json(file)["span_before"]
        return float(last)
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{file}: its span_before is no pair of times: copy the dataset again"
        ) from None


def _hold_out_arrivals(
    dataset: Dataset,
    split: ArrivalSplit,
    known: WarmStart,
    config: RunConfig,
    ranks: "Ranks",
) -> Dataset:
    """The dataset with the split, in which items that the model does not know have no counts."""
    dataset = hold_out(dataset, split, ranks, config.stream)
    if dataset.training is None:
        raise AssertionError("a split by time has counts of its own")
    count_N = np.where(known.source_N >= 0, dataset.training.item_counts, 0)
    counts = count_N.astype(dataset.training.item_counts.dtype)
    return replace(
        dataset, training=replace(dataset.training, item_counts=counts)
    )


def _score(trained: TrainedModel, wants_term: bool) -> dict[str, Any]:
    """Ranks the arrivals by all systems. Called on all ranks."""
    dataset = trained.dataset
    config = trained.config
    ranks = trained.ranks
    counts = count_recent(dataset, ranks, config.stream)
    recency = open_recency(counts, dataset, ranks, config)
    term = open_recency_term(trained, counts) if wants_term else None
    systems = [MODEL, RECENCY] if term is None else [WITH_RECENCY, RECENCY]
    positions = _ArrivalPositions(dataset, systems)
    with Stages(ranks.first) as stages, stages.open_stage("ranking") as show:
        ranking = evaluate_split(
            trained.model,
            trained.table,
            dataset,
            ranks,
            config,
            TEST.name,
            visit=positions.visit,
            advance=show,
            recency=recency,
            term=term,
        )
    min_users = config.evaluation.min_users
    record = make_evaluation_record(
        TEST.name,
        dataset,
        ranking,
        min_users=min_users,
        step=trained.checkpoint["step"],
        epoch=trained.checkpoint["epoch"],
    )
    against = positions.gather().compare_with_recency()
    return record | {"kind": ARRIVALS, "against_recency": against}


@dataclass(frozen=True)
class _RankedArrivals:
    """Where the model as it serves, and recency popularity, rank each target, of all ranks.

    systems: their keys in a record, in this order. position_ST: int64, from 1, 0 of a target that could not be read.
    row_T: int64, of the item. Of two systems and three targets, domain 1 from row 50:

        position_ST    [[1, 0, 7],
                        [2, 0, 3]]
        row_T          [4, 0, 51]
    """

    dataset: Dataset
    systems: tuple[str, ...]
    position_ST: np.ndarray
    row_T: np.ndarray

    @property
    def domain_T(self) -> np.ndarray:
        """The items' domains, int64."""
        return self.dataset.domain_of(self.row_T)

    @property
    def ranked_T(self) -> np.ndarray:
        """Whether a target could be read, bool."""
        return self.position_ST[0] > 0

    @property
    def seen_T(self) -> np.ndarray:
        """Whether a target is ranked and the model has learnt from its item, bool."""
        return self.ranked_T & self.dataset.is_trained(self.row_T)

    def compare_with_recency(self) -> dict[str, dict[str, Any]]:
        """`against_recency` of the record: domains of which an event is ranked."""
        dataset = self.dataset
        served, _ = self.systems
        position_T, recency_T = self.position_ST
        by_domain = {}
        for number, domain in enumerate(dataset.domains):
            is_own_T = self.seen_T & (self.domain_T == number)
            (own,) = np.nonzero(is_own_T)
            if not len(own):
                continue
            now_T = metric_values(HEADLINE, position_T[own])
            before_T = metric_values(HEADLINE, recency_T[own])
            user_T = users_of_targets(dataset, TEST.name, own)
            users, error = clustered_error(now_T - before_T, user_T)
            by_domain[domain.name] = {
                "system": served,
                "users": users,
                "now": float(now_T.mean()),
                "before": float(before_T.mean()),
                "error": error,
            }
        return by_domain


class _ArrivalPositions:
    """Keeps the positions of the targets that this rank ranks, by the systems that are compared."""

    def __init__(self, dataset: Dataset, systems: Sequence[str]) -> None:
        self._dataset = dataset
        self._systems = tuple(systems)
        targets = highest_target(dataset, TEST.name)
        self._position_ST = np.zeros((len(systems), targets), np.int32)
        self._row_T = np.zeros(targets, np.int64)

    def visit(
        self,
        candidates: Candidates,
        positions: Positions,
        _scores_C: np.ndarray,
    ) -> None:
        """Keeps one step's positions. `rank_candidates` calls it."""
        real = candidates.user_B >= 0
        number_B = candidates.number_B[real]
        self._row_T[number_B] = candidates.held_out_row_B[real]
        for system, position_T in zip(
            self._systems, self._position_ST, strict=True
        ):
            position_T[number_B] = positions[system][real]

    def gather(self) -> _RankedArrivals:
        """The positions of all ranks. Called on all of them: each target is ranked by one."""
        position_ST = sum_over_ranks(self._position_ST.reshape(-1))
        return _RankedArrivals(
            self._dataset,
            self._systems,
            position_ST.reshape(self._position_ST.shape).astype(np.int64),
            sum_over_ranks(self._row_T),
        )


def clustered_error(
    value_T: np.ndarray, user_T: np.ndarray
) -> tuple[int, float | None]:
    """How many users there are, and the standard error of the mean over events.

    A user's events are alike, so that users, not events, are the independent draws (a clustered
    standard error). None of fewer than two users. Two users, of whom the first has two events:

        value_T    0.3  0.1  −0.1    mean 0.1
        user_T     7    7    9
        sums       0.2       −0.2    of what is left without the mean
        error      √(2 · (0.2² + 0.2²)) / 3 = 0.13
    """
    _, index_T = np.unique(user_T, return_inverse=True)
    users = int(index_T.max(initial=-1)) + 1
    if users < 2:
        return users, None
    rest_U = np.bincount(index_T, weights=value_T - value_T.mean())
    variance = users / (users - 1) * float(rest_U @ rest_U)
    return users, math.sqrt(variance) / len(value_T)
