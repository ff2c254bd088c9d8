"""A finished run's best model, read back for inference: ranking, recommendation, export.

It is read at any number of ranks, and on a dataset that has changed since too.
"""

import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from trainer.checkpoint.layout import BestRecord
from trainer.checkpoint.load import find_best, restore_best
from trainer.checkpoint.resume import require_same_start
from trainer.checkpoint.warm_start import locate_dataset, match_model
from trainer.config.load import load_recorded
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.timeline import read_split, split_dataset
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.consensus import run_on_all_ranks
from trainer.errors import InputError
from trainer.files.redact import (
    find_local_folder,
    printable_text,
    redact_location,
)
from trainer.run_files import CONFIG

if TYPE_CHECKING:
    from embeddings.config import TableConfig
    from trainer.checkpoint.warm_start import WarmStart
    from trainer.distributed.process_group import Ranks


@dataclass(frozen=True)
class TrainedModel:
    """A finished run's best model, with all that inference needs of the run.

    model: the dense model, in evaluation mode. table: the item vectors, without an optimizer's
    state. dataset: what the run was trained on, or a later one. checkpoint: what best.json says of
    the model: folder, step, epoch and NDCG@10 of its validation. ranks: those that hold the table.
    """

    run: Path
    config: RunConfig
    dataset: Dataset
    model: SyNCRec
    table: ItemTable
    checkpoint: BestRecord
    ranks: "Ranks"


class TableSlot:
    """Holds at most one item table, into which models are read one after the other."""

    def __init__(self) -> None:
        self._table: ItemTable | None = None

    def take(
        self,
        rows: int,
        dim: int,
        config: "TableConfig",
        seed: int,
        device: torch.device,
    ) -> ItemTable:
        """Returns a table to read a model into.

        It is the present one where that has the same shape. Otherwise the present one is freed
        first: nobody may use it any more.
        """
        table = self._table
        if table is not None and table.rows == rows and table.dim == dim:
            table.reset(config.init_std, seed)
            return table
        table = None
        self._table = None
        free_memory()
        self._table = ItemTable(rows, dim, config, seed, device, filled=False)
        return self._table


def open_trained_model(
    run: Path | str,
    ranks: "Ranks",
    data: Path | str | None = None,
    of_all_domains: bool = False,
    slot: TableSlot | None = None,
) -> TrainedModel:
    """Opens a run and reads its best model: `open_run` and `load_trained_model` in one.

    Called on all ranks.
    """
    config, dataset = open_run(run, data, of_all_domains, ranks)
    return load_trained_model(run, config, dataset, ranks, slot)


def open_run(
    run: Path | str,
    data: Path | str | None = None,
    of_all_domains: bool = False,
    ranks: "Ranks | None" = None,
) -> tuple[RunConfig, Dataset]:
    """Opens a run's configuration and its dataset, the same on all ranks. Called on all ranks.

    data: the dataset's folder or address where it has moved, or where the run names an address:
    none is fetched from on a run's word. of_all_domains: refuse a run of one domain alone. ranks:
    where there are several, the first one of each host reads the dataset's files whole, to compare
    them.

    Raises InputError where configuration or dataset cannot be used.
    """

    def load() -> tuple[RunConfig, Dataset]:
        return _load_run(run, data, of_all_domains, ranks)

    config, dataset = run_on_all_ranks(load)
    require_same_start(config, dataset)
    return config, dataset


def _load_run(
    run: Path | str,
    data: Path | str | None,
    of_all_domains: bool,
    ranks: "Ranks | None",
) -> tuple[RunConfig, Dataset]:
    """Opens a run's configuration and dataset on this rank."""
    config = read_config(run)
    if of_all_domains and config.stream.domain:
        raise InputError(
            f"{run}: knows one domain alone, {config.stream.domain!r} (stream.domain): "
            "no more is asked of it"
        )
    if not data and find_local_folder(config.data) is None:
        raise InputError(
            f"{run}: was trained from an address, {printable_text(redact_location(config.data))}, "
            "which is not fetched from on a run's word; give it as --data"
        )
    place = str(data or locate_dataset(Path(run), config))
    folder = find_local_folder(place)
    if not data and folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"{run}: was trained on {printable_text(place)}, which is not there: give its dataset "
            "as --data"
        )
    config = replace(config, data=place)
    check_shards = config.stream.damaged == "stop"
    check_contents = ranks is None or ranks.local_rank == 0
    dataset = Dataset.load(
        config.data, check_shards, config.stream, check_contents
    )
    return config, dataset


def read_config(run: Path | str) -> RunConfig:
    """Reads the configuration that a run had.

    Raises InputError where the folder is no run, or its configuration cannot be used.
    """
    file = Path(run) / CONFIG
    if not file.is_file():
        raise InputError(f"{run}: is no run (there is no config.yaml in it)")
    return load_recorded(file)


def split_as_trained(
    run: Path | str, config: RunConfig, dataset: Dataset, ranks: "Ranks"
) -> Dataset:
    """The dataset as the run split it, by the cuts that it recorded. Called on all ranks.

    On a later dataset the cuts are at the same moments. Raises InputError as `split_dataset` does, and
    where the record cannot be read.
    """
    recorded = run_on_first_rank(lambda: read_split(Path(run)), ranks.first)
    return split_dataset(dataset, config, ranks, recorded)


def free_memory() -> None:
    """Frees unused tables: TorchRec's modules refer to themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_trained_model(
    run: Path | str,
    config: RunConfig,
    dataset: Dataset,
    ranks: "Ranks",
    slot: TableSlot | None = None,
) -> TrainedModel:
    """Reads a run's best model by validation. Called on all ranks.

    On a dataset that is not the run's own, items and domains are matched by their ids and names
    (`match_model`). slot: holds the table, for whoever reads more than one model. Raises InputError
    where there is no best model, or it is damaged or does not fit the dataset.
    """
    run = Path(run)
    folder, best, record = find_best(run, ranks)
    matched = None
    if record["dataset"] != dataset.fingerprint:
        matched = match_model(run, folder, record["dataset"], dataset, ranks)
    # Nothing is trained here: an optimizer without state, a placement that any device has, and one
    # copy on however many ranks there are, whatever the run was trained with.
    table_config = replace(
        config.table,
        optimizer="sgd",
        placement="auto",
        communication="fp32",
        group_size=0,
    )
    domains = len(dataset.domains)
    slot = slot or TableSlot()
    try:
        model = SyNCRec(config.model, domains).to(ranks.device).eval()
        table = slot.take(
            dataset.num_embeddings,
            config.model.dim,
            table_config,
            config.seed,
            ranks.device,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if matched is None:
        restore_best(folder, model, table)
    else:
        _restore_matched(matched, model, table, table_config.init_std, ranks)
    return TrainedModel(run, config, dataset, model, table, best, ranks)


def _restore_matched(
    matched: "WarmStart",
    model: SyNCRec,
    table: ItemTable,
    init_std: float,
    ranks: "Ranks",
) -> None:
    """Fills model and table on a dataset that is not the run's own, and says so."""
    matched.restore_model(model)
    matched.restore_table(table, init_std)
    if ranks.first:
        message = f"{matched.run}: was trained on another dataset; knows {matched.share}"
        print(message, file=sys.stderr, flush=True)
