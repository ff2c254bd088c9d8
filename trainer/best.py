"""A finished run's best model, read from disk into any number of ranks."""

import sys
from dataclasses import replace
from pathlib import Path

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from trainer.checkpoint import best_checkpoint, restore_best
from trainer.config import RunConfig, load_config
from trainer.consensus import on_all_ranks
from trainer.data.dataset import Dataset
from trainer.data.source import is_hidden
from trainer.errors import InputError
from trainer.start import require_same_start
from trainer.warm import carried


def open_run(run, data=None, of_all_domains=False) -> tuple[RunConfig, Dataset]:
    """The configuration that a run had, and its dataset, the same on all ranks. data: the dataset's
    folder or address where it has moved. Called on all ranks.

    Raises InputError where one of them cannot be used; of_all_domains: and where the run knows but one.
    """
    config, dataset = on_all_ranks(lambda: _opened(Path(run), data, of_all_domains))
    require_same_start(config, dataset)
    return config, dataset


def _opened(run, data, of_all_domains):
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: is no run (there is no config.yaml in it)")
    config = load_config([run / "config.yaml"], [])
    config = replace(config, data=str(data or config.data))
    if of_all_domains and config.stream.domain:
        raise InputError(f"{run}: knows one domain alone, {config.stream.domain!r} (stream.domain): no more is asked of it")
    if is_hidden(config.data):
        raise InputError(f"{run}: a run does not keep what is secret in its dataset's address; give it as --data")
    return config, Dataset.load(config.data, config.stream.damaged == "stop", config.stream)


def best_model(run, config: RunConfig, dataset: Dataset, ranks) -> tuple[SyNCRec, ItemTable, dict]:
    """The dense model and the item table as the run's best validation had them, and what best.json says of it; on a dataset
    that is not the run's own, what is left of them there (`carried`). Called on all ranks. Raises InputError where the run
    has none, or it is damaged or does not fit the dataset."""
    run = Path(run)
    folder, best, facts = best_checkpoint(run, ranks)
    change = None if facts["dataset"] == dataset.fingerprint else carried(run, folder, facts["dataset"], dataset)
    # Nothing is trained here: an optimizer without state and a place that any device has, whatever the run was trained with.
    table_config = replace(config.table, optimizer="sgd", placement="auto", communication="fp32")
    try:
        model = SyNCRec(config.model, len(dataset.domains)).to(ranks.device).eval()
        table = ItemTable(dataset.num_embeddings, config.model.dim, table_config, config.seed, ranks.device)
    except ValueError as error:
        raise InputError(str(error)) from None
    if change is None:
        restore_best(folder, model, table)
    else:
        change.restore_model(model)
        change.restore_table(table, table_config.init_std)
        if ranks.first:
            print(f"{run}: was trained on another dataset; knows {change.share}", file=sys.stderr, flush=True)
    return model, table, best
