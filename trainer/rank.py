"""Evaluation of a finished run."""

import sys

from rich.console import Console
from rich.progress import Progress

from trainer.best import best_model, open_run
from trainer.evaluate import evaluate_split, evaluation_record
from trainer.exchange import ResultWriter, read_candidates


def rank_run(run, ranks, split="test", data=None, candidates=None, output=None):
    """The evaluation record of a run's best model. Called on all ranks.

    data: the dataset's folder where it has moved; candidates, output: files as `trainer.exchange` has them.
    Raises InputError where one of them cannot be used.
    """
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
    return evaluation_record(split, dataset, ranking, step=best["step"], epoch=best["epoch"])


def _rank(model, table, dataset, ranks, config, split, given, visit):
    """`evaluate_split` with a bar on the first rank's stderr."""
    with Progress(console=Console(stderr=True), transient=True, disable=not ranks.first) as bar:
        task = bar.add_task("ranking")

        def advance(done, total):
            bar.update(task, completed=done, total=total)

        return evaluate_split(model, table, dataset, ranks, config, split, given, visit, advance)
