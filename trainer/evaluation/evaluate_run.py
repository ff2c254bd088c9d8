"""Evaluation of a finished run: the record that it prints, and the files that it leaves.

    RUN/evaluation-full-SPLIT.json    the record of a ranking among all items
    RUN/ranks-SPLIT.parquet           each user's positions (trainer/evaluation/user_ranks.py)

Both are left by a ranking among all items alone. Whoever calls writes the run's report anew.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.checkpoint.best_model import (
    TrainedModel,
    load_trained_model,
    open_run,
    split_as_trained,
)
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.day_counts import count_recent
from trainer.data.split import Timeline
from trainer.distributed.consensus import run_on_all_ranks
from trainer.distributed.determinism import use_deterministic_sums
from trainer.distributed.process_group import sum_over_ranks
from trainer.distributed.run_lock import lock_run_folder
from trainer.errors import InputError
from trainer.evaluation.candidate_files import (
    ResultWriter,
    read_candidates_of_rank,
)
from trainer.evaluation.evaluation import MODEL, WITH_RECENCY
from trainer.evaluation.full import FullRanking, full_record, rank_fully
from trainer.evaluation.recency.ranking import RecencyPopularity
from trainer.evaluation.recency.stored import (
    is_own_dataset,
    open_recency,
    open_recency_term,
)
from trainer.evaluation.recency.term import RecencyTerm
from trainer.evaluation.sampled import (
    Advance,
    Candidates,
    CandidatesByUser,
    PositionCounts,
    Positions,
    Visit,
    evaluate_split,
    make_evaluation_record,
)
from trainer.evaluation.targets import highest_target, users_of_targets
from trainer.evaluation.user_ranks import UserRanks, write_ranks
from trainer.files.atomic import write_json
from trainer.files.progress import Stages
from trainer.run_files import full_ranking_file, user_ranks_file

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks


def evaluate_run(
    run: str | Path,
    ranks: "Ranks",
    split: str = "test",
    data: str | Path | None = None,
    candidates: str | Path | None = None,
    output: str | Path | None = None,
    full: bool = False,
    recency_term: bool = False,
    skip_recency: bool = False,
) -> dict[str, Any]:
    """Evaluates a run's best model and returns the record. Called on all ranks.

    data: the dataset's folder where it has moved. candidates, output: files, see
    `trainer.evaluation.candidate_files`. full: rank among all items of the domain too, which
    leaves the record and each user's positions in the run's folder. recency_term: rank by the model
    with its recency term, too (trainer.evaluation.recency), as `evaluation.recency_term` does.
    skip_recency: leave recency popularity out; without the term no events are counted. Raises
    InputError where one of them cannot be used.
    """
    _check_options(split, candidates, full, recency_term)
    config, dataset = open_run(run, data, ranks=ranks)
    if candidates:
        _refuse_several_targets(run, config)
    dataset = split_as_trained(run, config, dataset, ranks)
    with use_deterministic_sums(config.deterministic):
        candidates_by_user = None
        if candidates:
            candidates_by_user = read_candidates_of_rank(
                dataset, candidates, ranks, config
            )
        trained = load_trained_model(run, config, dataset, ranks)
        with_term = recency_term or config.evaluation.recency_term
        recency, term = _open_recency(
            trained, not skip_recency, with_term and split == "test"
        )
        positions = _TargetPositions(dataset, split)
        ranking = _rank_candidates(
            trained,
            split,
            candidates_by_user,
            output,
            positions.visit if full else None,
            recency,
            term,
        )
        options = _record_options(trained)
        record = make_evaluation_record(split, dataset, ranking, **options)
        if not full:
            return record
        whole = _rank_fully(trained, split, recency, term)
        record = full_record(split, dataset, whole, record, **options)
        positions.sum_up()
    if ranks.first:
        user_ranks = _join_ranks(dataset, split, positions, whole)
        _save_full(Path(run), record, user_ranks)
    return record


def _check_options(
    split: str,
    candidates: str | Path | None,
    full: bool,
    recency_term: bool,
) -> None:
    """Raises InputError for options of `evaluate_run` that exclude one another."""
    if recency_term and split != "test":
        raise InputError(
            "--recency-term: its weights are fitted on the validation split; rank the test split"
        )
    if full and candidates:
        raise InputError(
            "--candidates: with --ranking full all items of the domain are the candidates; "
            "leave one of them out"
        )


def _rank_fully(
    trained: TrainedModel,
    split: str,
    recency: RecencyPopularity | None,
    term: RecencyTerm | None,
) -> FullRanking:
    """Ranks a split among all items."""
    with _progress_bar(trained.ranks, "ranking among all items") as advance:
        return rank_fully(
            trained.model,
            trained.table,
            trained.dataset,
            trained.ranks,
            trained.config,
            split,
            advance,
            recency=recency,
            term=term,
        )


def _refuse_several_targets(run: str | Path, config: RunConfig) -> None:
    """Raises InputError where a file of candidates does not name an event."""
    split = config.split
    if split.kind == Timeline.name and split.whose == "all":
        raise InputError(
            f"--candidates: {run} ranks all events of a user (split.whose=all), and a file has one "
            "row a user: leave it out"
        )


def _record_options(trained: TrainedModel) -> dict[str, int]:
    """What a record says of the model, and which domains count in its mean."""
    return {
        "step": trained.checkpoint["step"],
        "epoch": trained.checkpoint["epoch"],
        "min_users": trained.config.evaluation.min_users,
    }


def _open_recency(
    trained: TrainedModel, with_popularity: bool, with_term: bool
) -> tuple[RecencyPopularity | None, RecencyTerm | None]:
    """Recency popularity and the model's recency term, where they are wanted.

    Events are counted where one of them is.
    """
    recency = None
    term = None
    if not (with_popularity or with_term):
        return recency, term
    ranks = trained.ranks
    config = trained.config
    counts = count_recent(trained.dataset, ranks, config.stream)
    if with_popularity:
        run = trained.run if is_own_dataset(trained) else None
        recency = open_recency(counts, trained.dataset, ranks, config, run=run)
    if with_term:
        with _progress_bar(ranks, "fitting the recency term") as advance:
            term = open_recency_term(trained, counts, advance)
    return recency, term


class _TargetPositions:
    """The position of each target that this rank ranks among drawn candidates, and the domain.

    By the targets' numbers (trainer/evaluation/targets.py). seen_U: whether training has seen the
    item. term_U: positions with the recency term, 0 without one.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._dataset = dataset
        targets = highest_target(dataset, split)
        self.position_U = np.zeros(targets, np.int32)
        self.domain_U = np.zeros(targets, np.int32)
        self.seen_U = np.zeros(targets, np.int32)
        self.term_U = np.zeros(targets, np.int32)

    def visit(
        self,
        candidates: Candidates,
        positions: Positions,
        _scores_C: np.ndarray,
    ) -> None:
        """Keeps one step's positions."""
        real = candidates.user_B >= 0
        number_B = candidates.number_B[real]
        self.position_U[number_B] = positions[MODEL][real]
        self.domain_U[number_B] = candidates.domain_B[real]
        is_seen_B = self._dataset.is_trained(candidates.held_out_row_B)
        self.seen_U[number_B] = is_seen_B[real]
        if WITH_RECENCY in positions:
            self.term_U[number_B] = positions[WITH_RECENCY][real]

    def sum_up(self) -> None:
        """Makes them those of all ranks. Called on all of them."""
        self.position_U = sum_over_ranks(self.position_U)
        self.domain_U = sum_over_ranks(self.domain_U)
        self.seen_U = sum_over_ranks(self.seen_U)
        self.term_U = sum_over_ranks(self.term_U)


def _join_ranks(
    dataset: Dataset,
    split: str,
    positions: _TargetPositions,
    whole: FullRanking,
) -> UserRanks:
    """Both rankings' positions of each target that was ranked."""
    (targets,) = np.nonzero(whole.rank_U)
    term_rank_U = whole.term_rank_U
    return UserRanks(
        user=users_of_targets(dataset, split, targets),
        domain=positions.domain_U[targets],
        sampled=positions.position_U[targets],
        full=whole.rank_U[targets],
        target=targets,
        seen=positions.seen_U[targets] > 0,
        sampled_with_recency=positions.term_U[targets],
        full_with_recency=None if term_rank_U is None else term_rank_U[targets],
    )


def _rank_candidates(
    trained: TrainedModel,
    split: str,
    candidates: CandidatesByUser | None,
    output: str | Path | None,
    visit: Visit | None,
    recency: RecencyPopularity | None,
    term: RecencyTerm | None,
) -> PositionCounts:
    """Ranks a split among drawn or given candidates; leaves `output` where it is given.

    Says on stderr which users were skipped. Where it fails, it leaves no part of `output`.
    """
    ranks = trained.ranks
    writer = None
    if output:
        writer = _open_writer(trained.dataset, output, ranks)

    def visit_both(
        batch: Candidates, positions: Positions, scores_C: np.ndarray
    ) -> None:
        if visit:
            visit(batch, positions, scores_C)
        if writer:
            writer.add(batch, positions[MODEL], scores_C)

    try:
        with _progress_bar(ranks, "ranking") as advance:
            ranking = evaluate_split(
                trained.model,
                trained.table,
                trained.dataset,
                ranks,
                trained.config,
                split,
                candidates,
                visit_both,
                advance,
                recency=recency,
                term=term,
            )
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:
        writer.finish()
    for reason in ranking.reasons:
        _warn(f"skipped: {reason}")
    return ranking


def _open_writer(
    dataset: Dataset, output: str | Path, ranks: "Ranks"
) -> ResultWriter:
    """Opens this rank's part of the results, or leaves none where another rank's fails."""
    opened: list[ResultWriter] = []
    try:
        run_on_all_ranks(
            lambda: opened.append(ResultWriter(dataset, output, ranks))
        )
    except BaseException:
        for writer in opened:
            writer.discard()
        raise
    return opened[0]


@contextlib.contextmanager
def _progress_bar(ranks: "Ranks", text: str) -> Iterator[Advance]:
    """A progress bar on the first rank's stderr; yields advance(done, total)."""
    with Stages(ranks.first) as stages, stages.open_stage(text) as show:
        yield show


def _save_full(
    run: Path, record: dict[str, Any], user_ranks: UserRanks
) -> None:
    """Leaves a full ranking's record and each target's positions in the run's folder.

    A folder that cannot be written does not lose the figures: the caller shows them.
    """
    split = record["kind"]
    try:
        with lock_run_folder(run):
            write_ranks(run / user_ranks_file(split), user_ranks)
            write_json(run / full_ranking_file(split), record)
    except InputError as error:
        _warn(f"{error}: the figures are only shown")
    except OSError as error:
        _warn(
            f"{run}: cannot be written ({error.strerror}): the figures are only shown"
        )


def _warn(line: str) -> None:
    print(
        line,
        file=sys.stderr,
        flush=True,
    )
