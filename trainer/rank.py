"""Evaluation of a finished run."""

import contextlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from trainer.best import best_model, open_run
from trainer.checkpoint import write_json
from trainer.errors import InputError
from trainer.evaluate import evaluate_split, evaluation_record
from trainer.exchange import ResultWriter, read_candidates
from trainer.full_ranking import full_record, rank_fully
from trainer.log import METRICS_FILE
from trainer.report import FULL, write_report


def rank_run(run, ranks, split="test", data=None, candidates=None, output=None, full=False):
    """The evaluation record of a run's best model. Called on all ranks.

    data: the dataset's folder where it has moved; candidates, output: files as `trainer.exchange` has them; full: rank among
    all items of the domain too, which leaves `evaluation-full-SPLIT.json` in the run's folder, and its report anew.
    Raises InputError where one of them cannot be used.
    """
    if full and candidates:
        raise InputError("--candidates: with --ranking full all items of the domain are the candidates; leave one of them out")
    config, dataset = open_run(run, data)
    given = read_candidates(dataset, candidates) if candidates else None
    model, table, best = best_model(run, config, dataset, ranks)
    writer = ResultWriter(dataset, output, ranks) if output else None
    try:
        ranking = _rank(model, table, dataset, ranks, config, split, given, writer.add if writer else None)
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
        if ranks.first:
            _keep(Path(run), record)
    return record


def _rank(model, table, dataset, ranks, config, split, given, visit):
    with _bar(ranks, "ranking") as advance:
        return evaluate_split(model, table, dataset, ranks, config, split, given, visit, advance)


@contextlib.contextmanager
def _bar(ranks, words):
    """A bar on the first rank's stderr; yields what is told how far it is."""
    with Progress(console=Console(stderr=True), transient=True, disable=not ranks.first) as bar:
        task = bar.add_task(words)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _keep(run, record):
    """Leaves a full ranking's record in the run's folder; a folder that cannot be written does not lose the figures."""
    try:
        write_json(run / f"{FULL}-{record['kind']}.json", record)
        if (run / METRICS_FILE).is_file():
            write_report(run)
    except OSError as error:
        print(f"{run}: cannot be written ({error.strerror}): the figures are only shown", file=sys.stderr, flush=True)
