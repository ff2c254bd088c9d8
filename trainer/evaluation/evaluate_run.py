"""Evaluation of a finished run."""

import contextlib
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from trainer.checkpoint.best_model import best_model, open_run
from trainer.distributed.consensus import on_all_ranks
from trainer.distributed.determinism import deterministic_sums
from trainer.distributed.run_lock import locked
from trainer.errors import InputError
from trainer.evaluation.candidate_files import ResultWriter, read_candidates_of_rank
from trainer.evaluation.full import full_record, rank_fully, summed
from trainer.evaluation.sampled import evaluate_split, evaluation_record
from trainer.evaluation.user_ranks import write_ranks
from trainer.files.atomic import write_json
from trainer.reporting.run_log import METRICS_FILE
from trainer.reporting.run_report import FULL, write_report
from trainer.run_files import RANKS


def rank_run(
    run, ranks, split="test", data=None, candidates=None, output=None, full=False
):
    """The evaluation record of a run's best model. Called on all ranks.

    data: the dataset's folder where it has moved; candidates, output: files as `trainer.evaluation.candidate_files` has them; full: rank among
    all items of the domain too, which leaves `evaluation-full-SPLIT.json` and RANKS in the run's folder, and its report anew.
    Raises InputError where one of them cannot be used.
    """
    if full and candidates:
        raise InputError(
            "--candidates: with --ranking full all items of the domain are the candidates; leave one of them out"
        )
    config, dataset = open_run(run, data, ranks=ranks)
    with deterministic_sums(config.deterministic):
        return _rank_run(run, config, dataset, ranks, split, candidates, output, full)


def _rank_run(run, config, dataset, ranks, split, candidates, output, full):
    given = (
        read_candidates_of_rank(dataset, candidates, ranks, config)
        if candidates
        else None
    )
    model, table, best = best_model(run, config, dataset, ranks)
    writer = None

    def begin():
        nonlocal writer
        writer = ResultWriter(dataset, output, ranks)

    sampled_U, domain_U = np.zeros((2, dataset.users if full else 0), np.int32)

    def visit(candidates, ranks_B, scores_C):
        if full:
            real = candidates.user_B >= 0
            sampled_U[candidates.user_B[real]] = ranks_B[real]
            domain_U[candidates.user_B[real]] = candidates.domain_B[real]
        if writer:
            writer.add(candidates, ranks_B, scores_C)

    try:
        if output:
            on_all_ranks(begin)
        ranking = _rank(model, table, dataset, ranks, config, split, given, visit)
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:
        writer.finish()
    for reason in ranking.reasons:
        print(f"skipped: {reason}", file=sys.stderr, flush=True)
    where = {"step": best["step"], "epoch": best["epoch"]}
    record = evaluation_record(split, dataset, ranking, **where)
    if full:
        with _bar(ranks, "ranking among all items") as advance:
            whole = rank_fully(model, table, dataset, ranks, config, split, advance)
        record = full_record(split, dataset, whole, record, **where)
        of_users = summed(domain_U, ranks), summed(sampled_U, ranks), whole.rank_U
        if ranks.first:
            _keep(Path(run), record, of_users)
    return record


def _rank(model, table, dataset, ranks, config, split, given, visit):
    with _bar(ranks, "ranking") as advance:
        return evaluate_split(
            model, table, dataset, ranks, config, split, given, visit, advance
        )


@contextlib.contextmanager
def _bar(ranks, words):
    """A bar on the first rank's stderr; yields what is told how far it is."""
    with Progress(
        console=Console(stderr=True), transient=True, disable=not ranks.first
    ) as bar:
        task = bar.add_task(words)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _keep(run, record, of_users):
    """Leaves a full ranking's record in the run's folder, and each user's ranks; a folder that cannot be written does not lose
    the figures."""
    (users,) = np.nonzero(of_users[-1])
    try:
        with locked(run):
            write_ranks(
                run / RANKS.format(split=record["kind"]),
                users,
                *(values_U[users] for values_U in of_users),
            )
            write_json(run / f"{FULL}-{record['kind']}.json", record)
            if (run / METRICS_FILE).is_file():
                write_report(run)
    except InputError as error:
        print(f"{error}: the figures are only shown", file=sys.stderr, flush=True)
    except OSError as error:
        print(
            f"{run}: cannot be written ({error.strerror}): the figures are only shown",
            file=sys.stderr,
            flush=True,
        )
