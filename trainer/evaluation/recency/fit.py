"""Fitting a model's recency term: one pass over the validation split, ranked by the model."""

from typing import TYPE_CHECKING

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.recent_counts import RecentCounts
from trainer.evaluation.recency.term import RecencyTerm, TermFit
from trainer.evaluation.sampled import Advance, Model, evaluate_split

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks


def fit_recency_term(
    model: Model,
    table: "ItemTable",
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    counts: RecentCounts,
    advance: Advance | None = None,
) -> RecencyTerm:
    """The term that ranks the validation items best beside the model's scores. Called on all ranks.

    advance(done, total): called after every step.
    """
    fit = TermFit(dataset, config, counts)
    evaluate_split(
        model,
        table,
        dataset,
        ranks,
        config,
        "validation",
        visit=fit.visit,
        advance=advance,
    )
    return fit.fit()
