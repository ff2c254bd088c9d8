"""A finished run's best model as it serves: with its settings, its dataset and its ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embeddings.table import ItemTable
from syncrec.model import SyNCRec
from trainer.checkpoint.best_model import TableSlot, best_model
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.distributed.process_group import Ranks


@dataclass(frozen=True)
class ServedModel:
    """The dense model and the item table of a run's best validation, on a dataset.

    best: what the run's best.json says of that validation (step, epoch, …).
    """

    model: SyNCRec
    table: ItemTable
    best: dict[str, Any]
    config: RunConfig
    dataset: Dataset
    ranks: Ranks

    @classmethod
    def load(
        cls,
        run: str | Path,
        config: RunConfig,
        dataset: Dataset,
        ranks: Ranks,
        slot: TableSlot | None = None,
    ) -> "ServedModel":
        """Reads the model from the run's folder. Called on all ranks.

        slot: holds the one table into which several models are read, one after the other.
        Raises InputError where the run has no model, or it does not fit the dataset.
        """
        model, table, best = best_model(
            run,
            config,
            dataset,
            ranks,
            slot,
        )
        return cls(
            model,
            table,
            best,
            config,
            dataset,
            ranks,
        )
