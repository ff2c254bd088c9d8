"""A finished run's best model, read from disk into any number of ranks."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from trainer.checkpoint.resume import require_same_start
from trainer.checkpoint.save import best_checkpoint, restore_best
from trainer.checkpoint.warm_start import carried
from trainer.config.load import load_recorded
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.distributed.consensus import on_all_ranks
from trainer.errors import InputError
from trainer.files.redact import folder_of, shown, words


def open_run(
    run, data=None, of_all_domains=False, ranks=None
) -> tuple[RunConfig, Dataset]:
    """The configuration that a run had, and its dataset, the same on all ranks. Called on all ranks.

    data: the dataset's folder or address where it has moved, or where the run names an address: none is fetched from on a
    run's word. ranks: where there are several, of which the first of each host reads the dataset's files whole, to compare
    them.

    Raises InputError where one of them cannot be used; of_all_domains: and where the run knows but one.
    """
    config, dataset = on_all_ranks(lambda: _opened(run, data, of_all_domains, ranks))
    require_same_start(config, dataset)
    return config, dataset


def _opened(run, data, of_all_domains, ranks):
    config = config_of(run)
    if of_all_domains and config.stream.domain:
        raise InputError(
            f"{run}: knows one domain alone, {config.stream.domain!r} (stream.domain): no more is asked of it"
        )
    if not data and folder_of(config.data) is None:
        raise InputError(
            f"{run}: was trained from an address, {words(shown(config.data))}, which is not fetched from on a run's word; "
            "give it as --data"
        )
    config = replace(config, data=str(data or config.data))
    check_contents = ranks is None or ranks.local_rank == 0
    return config, Dataset.load(
        config.data, config.stream.damaged == "stop", config.stream, check_contents
    )


def config_of(run) -> RunConfig:
    """The configuration that a run had. Raises InputError where it is no run, or has none that can be used."""
    if not (Path(run) / "config.yaml").is_file():
        raise InputError(f"{run}: is no run (there is no config.yaml in it)")
    return load_recorded(Path(run) / "config.yaml")


class TableSlot:
    """Holds one item table at most, into which models are read one after the other."""

    def __init__(self):
        self._table = None

    def take(self, rows, dim, config, seed, device) -> ItemTable:
        """A table to read a model into: the one that is there, where it has the same shape. Otherwise that one is let go first.
        Nobody may use it any more."""
        table = self._table
        if table is not None and (table.rows, table.dim) == (rows, dim):
            table.begin_anew(config.init_std, seed)
            return table
        table = self._table = None
        free_memory()
        self._table = ItemTable(rows, dim, config, seed, device, filled=False)
        return self._table


def free_memory():
    """Frees the tables that nobody refers to any more: TorchRec's modules refer to themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def best_model(
    run, config: RunConfig, dataset: Dataset, ranks, slot=None
) -> tuple[SyNCRec, ItemTable, dict]:
    """The dense model and the item table as the run's best validation had them, and what best.json says of it; on a dataset
    that is not the run's own, what is left of them there (`carried`). Called on all ranks. slot: a TableSlot, for whoever reads
    more than one. Raises InputError where the run has none, or it is damaged or does not fit the dataset."""
    run = Path(run)
    folder, best, facts = best_checkpoint(run, ranks)
    change = (
        None
        if facts["dataset"] == dataset.fingerprint
        else carried(run, folder, facts["dataset"], dataset, ranks)
    )
    # Nothing is trained here: an optimizer without state and a place that any device has, whatever the run was trained with.
    table_config = replace(
        config.table, optimizer="sgd", placement="auto", communication="fp32"
    )
    slot = slot or TableSlot()
    try:
        model = SyNCRec(config.model, len(dataset.domains)).to(ranks.device).eval()
        table = slot.take(
            dataset.num_embeddings,
            config.model.dim,
            table_config,
            config.seed,
            ranks.device,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if change is None:
        restore_best(folder, model, table)
    else:
        change.restore_model(model)
        change.restore_table(table, table_config.init_std)
        if ranks.first:
            print(
                f"{run}: was trained on another dataset; knows {change.share}",
                file=sys.stderr,
                flush=True,
            )
    return model, table, best
