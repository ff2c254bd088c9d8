"""RecTools itself, where there is its environment: `make peers`, or RECTOOLS_PYTHON=…/bin/python."""

import stat

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import HELPERS
from tests.helpers.made import draw_histories, write_dataset
from tests.unit.trainer.study.peers.test_recbole import slow_ranks
from trainer.data.split import SPLIT_LENGTH
from trainer.errors import InputError
from trainer.study.peers.bridge import RANKS, run_peer
from trainer.study.peers.rectools_bridge import (
    RECTOOLS,
    default_rectools_python,
)

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not default_rectools_python().is_file(),
        reason=f"RecTools' environment, {default_rectools_python()}, is not there: make peers",
    ),
]
# Of the second domain there are fewer than a hundred candidates; some items are only ever held out.
ITEMS = (130, 60)
HISTORIES = draw_histories(60, ITEMS, longest=8)
LONG = [history for history in HISTORIES if len(history) >= SPLIT_LENGTH]
LIGR = {
    "transformer_layers_type": "rectools.models.nn.transformers.ligr.LiGRLayers",
    "transformer_layers_kwargs.ff_factors_multiplier": 2,
    "use_key_padding_mask": True,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("rectools") / "data",
        HISTORIES,
        ITEMS,
        cuts=(25,),
        streams=2,
    )


def task_of(options, **more):
    task = {
        "model": "SASRec",
        "seed": 1,
        "epochs": 3,
        "patience": 2,
        "minutes": 0,
        "evaluation_seed": 7,
        "negatives": 99,
        "min_users": 1,
    }
    small = {
        "n_factors": 16,
        "n_heads": 1,
        "session_max_len": 5,
        "batch_size": 16,
        "loss": "sampled_softmax",
        "n_negatives": 20,
        "lr": 0.01,
    }
    return task | more | {"options": small | options}


@pytest.mark.parametrize("options", [{}, LIGR], ids=["SASRec", "eSASRec"])
def test_ranks_are_those_of_its_own_recommendations_at_the_best_epoch(
    dataset, tmp_path, monkeypatch, options
):
    python = tmp_path / "python"
    script = HELPERS.joinpath("every_rectools_score.py")
    python.write_text(
        f'#!/bin/sh\nexec "{default_rectools_python()}" "{script}" "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("SCORES", str(tmp_path / "scores.npy"))
    lines = []
    found = run_peer(
        RECTOOLS,
        dataset,
        tmp_path / "run",
        python,
        task_of(options),
        lines.append,
    )
    scores_UI = np.load(tmp_path / "scores.npy")
    domains, sampled, full = slow_ranks(dataset, scores_UI, 7)
    table = pq.read_table(tmp_path / "run" / RANKS).to_pydict()
    assert table["domain"] == domains
    assert table["sampled"] == sampled
    assert table["full"] == full
    assert len(set(sampled)) > 5
    values = [epoch["validation"] for epoch in found["epochs"]]
    assert found["validation"] == max(values)
    assert found["best_epoch"] == int(np.argmax(values))
    assert found["validation_again"] == found["validation"]
    # Every interaction of the training part's newest six is predicted but a user's first.
    assert found["samples_per_epoch"] == sum(
        min(max(len(history) - 3, 0), 5) for history in LONG
    )
    assert found["memory_bytes"] > 0 and found["start_up_seconds"] > 0
    assert len([line for line in lines if " of 3, validation" in line]) == len(
        values
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_factor": 8}, r"^RecTools does not take n_factor"),
        ({"epochs": 8}, r"^epochs is not among RecTools' options"),
    ],
)
def test_an_option_that_rectools_would_not_heed_is_refused(
    dataset, tmp_path, options, message
):
    with pytest.raises(InputError, match=message):
        run_peer(
            RECTOOLS,
            dataset,
            tmp_path / "run",
            default_rectools_python(),
            task_of(options),
            lambda line: None,
        )


def test_another_model_is_refused(dataset, tmp_path):
    with pytest.raises(InputError, match=r"^RecTools' HSTU is not compared"):
        run_peer(
            RECTOOLS,
            dataset,
            tmp_path / "run",
            default_rectools_python(),
            task_of({}, model="HSTU"),
            lambda line: None,
        )
