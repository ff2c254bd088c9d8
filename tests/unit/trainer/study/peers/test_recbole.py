"""RecBole itself, where there is its environment: `make peers`, or RECBOLE_PYTHON=…/bin/python."""

import stat

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import HELPERS
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.evaluation import EvaluationConfig
from trainer.data.split import SPLIT_LENGTH
from trainer.errors import InputError
from trainer.evaluation.sampled import RankingBatches
from trainer.study.peers.recbole_bridge import (
    RANKS,
    default_python,
    recbole_models,
    run_recbole,
)

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not default_python().is_file(),
        reason=f"RecBole's environment, {default_python()}, is not there: make peers",
    ),
]
ITEMS = (
    130,
    60,
)  # of the second domain there are fewer than a hundred candidates
HISTORIES = draw_histories(60, ITEMS, longest=8)
LONG = {
    user: history
    for user, history in enumerate(HISTORIES)
    if len(history) >= SPLIT_LENGTH
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("recbole") / "data",
        HISTORIES,
        ITEMS,
        cuts=(25,),
        streams=2,
    )


@pytest.fixture
def python(tmp_path):
    """RecBole's, which leaves every pair's score as well."""
    file = tmp_path / "python"
    file.write_text(
        f'#!/bin/sh\nexec "{default_python()}" "{HELPERS.joinpath("every_pair.py")}" "$@"\n'
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def slow_ranks(dataset, scores_UI, seed):
    """(domains, sampled, full) of the users that can be split, by definition."""
    candidates = {}
    for built in RankingBatches(
        dataset, 0, 1, EvaluationConfig(), 64, "test", seed=seed
    ):
        rows = np.split(built.rows_C, np.cumsum(built.counts_B)[:-1])
        candidates |= dict(zip(built.user_B.tolist(), rows, strict=True))
    domains, sampled, full = [], [], []
    for place, (user, history) in enumerate(LONG.items()):
        item, scores = history[-1], scores_UI[place]
        domain = dataset.domains[int(dataset.domain_of(item))]
        others = (
            set(range(domain.start, domain.start + domain.items))
            - set(history[:-1].tolist())
            - {item}
        )
        domains.append(dataset.domains.index(domain))
        sampled.append(
            sum(not scores[item] > scores[row] for row in candidates[user])
        )
        full.append(1 + sum(not scores[item] > scores[row] for row in others))
    return domains, sampled, full


# A user's vector, a sequence, both with a distance, pairs alone, a sequence that is masked.
@pytest.mark.parametrize(
    "model", ["BPR", "GRU4Rec", "TransRec", "NeuMF", "BERT4Rec"]
)
def test_ranks_are_those_of_every_pairs_score_at_the_best_epoch(
    dataset, python, tmp_path, monkeypatch, model
):
    monkeypatch.setenv("SCORES", str(tmp_path / "scores.npy"))
    options = {
        "train_batch_size": 64,
        "MAX_ITEM_LIST_LENGTH": 5,
        "learning_rate": 0.01,
    }
    lines = []
    found = run_recbole(
        dataset,
        tmp_path / "run",
        model,
        1,
        python,
        options,
        epochs=4,
        patience=2,
        say=lines.append,
        evaluation_seed=7,
    )
    table = pq.read_table(tmp_path / "run" / RANKS).to_pydict()
    domains, sampled, full = slow_ranks(
        dataset, np.load(tmp_path / "scores.npy"), 7
    )
    expected = {
        "user": list(LONG),
        "domain": domains,
        "sampled": sampled,
        "full": full,
    }
    assert {name: table[name] for name in expected} == expected
    values = [epoch["validation"] for epoch in found["epochs"]]
    assert found["best_epoch"] == int(np.argmax(values)) and found[
        "validation"
    ] == max(values)
    assert found["validation_again"] == found["validation"]
    assert found["stopped"] == (
        "all epochs" if len(values) == 4 else "patience"
    )
    assert (
        found["recbole"]["learning_rate"] == 0.01
        and found["versions"]["recbole"]
    )
    # Samples of the training part alone: every interaction, or every one that something comes before.
    before = 1 if found["family"] == "sequential" else 0
    assert found["samples_per_epoch"] == sum(
        len(history) - 2 - before for history in LONG.values()
    )
    assert len([line for line in lines if " of 4, validation" in line]) == len(
        values
    )


def test_an_option_that_recbole_would_not_heed_is_refused(dataset, tmp_path):
    with pytest.raises(
        InputError, match=r"^RecBole has no option learning_rat: learning_rate"
    ):
        run_recbole(
            dataset,
            tmp_path / "run",
            "BPR",
            1,
            default_python(),
            {"learning_rat": 0.1},
            say=lambda line: None,
        )
    with pytest.raises(
        InputError,
        match=r"^eval_args is not among RecBole's options that can be chosen here",
    ):
        run_recbole(
            dataset,
            tmp_path / "run",
            "BPR",
            1,
            default_python(),
            {"eval_args": {}},
            say=lambda line: None,
        )


def test_models_are_named_with_why_some_cannot_be_compared():
    models = recbole_models(default_python())
    wanted = [
        "BPR",
        "GRU4Rec",
        "SASRec",
        "BERT4Rec",
        "NextItNet",
        "SINE",
        "STAMP",
        "TransRec",
        "LightSANs",
        "NARM",
        "GCMC",
    ]
    assert [models[name] for name in wanted] == [None] * len(wanted)
    assert (
        "pretrained" in models["S3Rec"]
        and "knowledge graph" in models["GRU4RecKG"]
        and models["DeepFM"]
    )
