"""Evaluation of a finished run: its best model, read from disk into any number of ranks."""

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from trainer.checkpoint import load_best
from trainer.config import load_config
from trainer.data.dataset import Dataset
from trainer.data.source import is_hidden
from trainer.errors import InputError
from trainer.evaluate import evaluate_split, evaluation_record
from trainer.exchange import ResultWriter, read_candidates


def rank_run(run, ranks, split="test", data=None, candidates=None, output=None):
    """The evaluation record of a run's best model. Called on all ranks.

    data: the dataset's folder where it has moved; candidates, output: files as `trainer.exchange` has them.
    Raises InputError where one of them cannot be used.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: is no run (there is no config.yaml in it)")
    config = load_config([run / "config.yaml"], [])
    config = replace(config, data=str(data or config.data))
    if is_hidden(config.data):
        raise InputError(f"{run}: a run does not keep what is secret in its dataset's address; give it as --data")
    dataset = Dataset.load(config.data, config.stream.damaged == "stop", config.stream)
    given = read_candidates(dataset, candidates) if candidates else None
    model = SyNCRec(config.model, len(dataset.domains)).to(ranks.device).eval()
    # Nothing is trained here: an optimizer without state and a place that any device has, whatever the run was trained with.
    table_config = replace(config.table, optimizer="sgd", placement="auto", communication="fp32")
    try:
        table = ItemTable(dataset.num_embeddings, config.model.dim, table_config, config.seed, ranks.device)
    except ValueError as error:
        raise InputError(str(error)) from None
    best = load_best(run, model, table, ranks)
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
