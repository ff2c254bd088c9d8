"""The figures of records by tags."""

from tests.unit.trainer.reporting.test_run_log import (
    evaluation_record,
    train_record,
)
from trainer.reporting.trackers.scalars import (
    evaluation_scalars,
    train_scalars,
)


def test_a_train_record_gives_its_figures_and_no_nulls():
    record = train_record(10, phi={"Books": 0.5, "Toys": None})
    scalars = train_scalars(record)
    assert scalars["loss/total"] == 2.5 and scalars["lambda/Toys"] == 0.5
    assert scalars["phi/Books"] == 0.5
    assert not {"phi/Toys", "optimizer/gradient_norm"} & scalars.keys()


def test_an_evaluation_gives_means_and_domains():
    scalars = evaluation_scalars(evaluation_record(10, kind="test"))
    assert scalars["test mean/NDCG@10"] == 0.25
    assert scalars["test HR@5/Books"] == 0.25
