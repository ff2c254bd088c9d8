"""The figures of a run's records by tags, as trackers draw them: "loss/total", "phi/Books"."""

from typing import Any

from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.trackers.tracker import Scalars

_BY_DOMAIN = ("single_by_domain", "cross_by_domain", "lambda", "phi")
_TRAIN_TAGS = {
    "loss": "loss/total",
    "loss_single": "loss/single",
    "loss_cross": "loss/cross",
    "mutual_information": "loss/mutual_information",
    "alpha": "transfer/alpha",
    "beta": "transfer/beta",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "users_per_second": "speed/users_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "data_wait": "speed/data_wait",
    "exchange": "speed/exchange",
    "padding": "speed/padding",
    "mfu": "speed/mfu",
    "memory_gb": "speed/memory_gb",
}


def train_scalars(record: dict[str, Any]) -> Scalars:
    """A train record's figures by their tags; what is null is left out.

    {"loss": 2.5, "phi": {"Books": 0.1, "Toys": None}, …} gives
    {"loss/total": 2.5, "phi/Books": 0.1, …}.
    """
    scalars = {}
    for field, tag in _TRAIN_TAGS.items():
        scalars[tag] = record.get(field)
    for field in _BY_DOMAIN:
        by_domain = record.get(field) or {}
        for domain, value in by_domain.items():
            scalars[f"{field}/{domain}"] = value
    return _without_nulls(scalars)


def evaluation_scalars(record: dict[str, Any]) -> Scalars:
    """An evaluation's figures by their tags; what is null is left out.

    test mean/NDCG@10      the mean over the domains that count
    test mean over users/NDCG@10
    test NDCG@10/Books     of a domain
    """
    evaluation = Evaluation.from_record(record)
    scalars = {}
    split = evaluation.kind
    for metric in evaluation.metrics:
        mean_tag = f"{split} mean/{metric}"
        scalars[mean_tag] = evaluation.mean.get(metric)
        user_mean_tag = f"{split} mean over users/{metric}"
        scalars[user_mean_tag] = evaluation.user_mean.get(metric)
        for row in evaluation.by_domain:
            tag = f"{split} {metric}/{row.name}"
            scalars[tag] = row.model.get(metric)
    return _without_nulls(scalars)


def _without_nulls(scalars: dict[str, float | None]) -> Scalars:
    present = {}
    for tag, value in scalars.items():
        if value is not None:
            present[tag] = float(value)
    return present
