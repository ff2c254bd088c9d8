"""Planted relations are found: the study of synthetic logs in which two domains help each other and the others harm a third."""

import json

import numpy as np
import pytest

from tests.helpers.rank_processes import forked_python, run_alone
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs
from trainer.evaluation.user_ranks import read_ranks
from trainer.study.results import RunResult, collect_results, paired_difference

HARMED, RELATED = "ads", ("shop", "video")
BASE = """
global_batch_size: 64
epochs: {epochs}
model: {{dim: 16, ffn_dim: 16, max_length: 48, blocks: 1, experts: 3, cross_experts: 2,
        stop_gradient: true, loss_correction: negative_transfer_gap, mutual_information: true,
        correction_total: domains, learn_scales: false, time_knots: 0}}
table: {{optimizer: adagrad, learning_rate: 0.1}}
negatives: {{shared: 80}}
evaluation: {{patience: 3}}
stream: {{workers: 0}}
"""
SMALL, WHOLE = (300, 5), (1500, 12)  # users, epochs


@pytest.fixture(
    scope="module",
    params=[SMALL, pytest.param(WHOLE, marks=pytest.mark.slow)],
    ids=["small", "whole"],
)
def size(request):
    return request.param


@pytest.fixture(scope="module")
def study(tmp_path_factory, size):
    """The study's folder."""
    folder = tmp_path_factory.mktemp("truth")
    users, epochs = size
    synthesize_logs(
        folder / "logs",
        SyntheticConfig(
            users=users, items=240, domains=3, mean_length=40, topics=16
        ),
    )
    prepare(
        PrepareConfig(
            inputs=(str(folder / "logs"),), output=str(folder / "data")
        )
    )
    (folder / "base.yaml").write_text(BASE.format(epochs=epochs))
    command = [
        "launch/study.py",
        "--data",
        folder / "data",
        "--output",
        folder / "study",
    ]
    command += [
        "--base",
        folder / "base.yaml",
        "systems=[SyNCRec,SDSR]",
        "parallel=2",
    ]
    done = run_alone(*command, timeout=3000, FORKED_PYTHON=forked_python())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"report: {folder / 'study' / 'report.html'}" in done.stdout
    return folder / "study"


def ranks_of(study, *runs):
    facts = {
        "validation": 0.0,
        "seconds": 0.0,
        "users_per_second": 0.0,
        "epochs": 0,
    }
    return collect_results(
        "one",
        [
            [
                RunResult(
                    **read_ranks(
                        study / "runs" / run / "run" / "ranks-test.parquet"
                    ),
                    **facts,
                )
                for run in runs
            ]
        ],
    )


def test_lambda_falls_most_for_the_domain_that_others_harm(study, size):
    """λ and φ at the end of training; λ is 1 where all domains weigh alike.

    Of the small study, with seeds 0 to 2: λ of ads 0.47 to 0.53, of shop 1.00 to 1.15, of video 1.38 to 1.51;
    φ of ads −0.77 to −0.70, of shop −0.26 to −0.13, of video −0.06 to 0.07.

    Of the whole one, with seeds 0 to 3: λ of ads 0.57 to 0.70, of shop 0.77 to 1.08, of video 1.29 to 1.55;
    φ of ads −0.49 to −0.41, of shop −0.14 to −0.09, of video 0.09 to 0.10.
    """
    lines = (
        (study / "runs/SyNCRec-seed=0/run/metrics.jsonl")
        .read_text()
        .splitlines()
    )
    train = [
        record for record in map(json.loads, lines) if record["kind"] == "train"
    ]
    last = train[-1]
    at_end = [
        record["phi"]
        for record in train
        if record["step"] > last["step"] - 4 * size[1]
    ]
    gaps = {
        name: np.mean([phi[name] for phi in at_end])
        for name in (HARMED, *RELATED)
    }
    related_weights = [last["lambda"][name] for name in RELATED]
    related_gaps = [gaps[name] for name in RELATED]
    assert last["lambda"][HARMED] < 0.8
    assert last["lambda"][HARMED] < min(related_weights)
    assert max(related_weights) > 1.2
    assert gaps[HARMED] < -0.3 < min(related_gaps)
    if size == WHOLE:
        assert max(related_gaps) > 0


@pytest.mark.parametrize(
    "size",
    [pytest.param(WHOLE, marks=pytest.mark.slow)],
    ids=["whole"],
    indirect=True,
)
def test_the_harmed_domain_keeps_what_it_has_alone_and_the_related_ones_gain(
    study,
):
    """Test NDCG@10 of SyNCRec less that of each domain alone.

    Seen with seeds 0 to 3: ads −0.021 to 0.003 of 0.79, shop 0.009 to 0.024 of 0.55, video 0.038
    to 0.058 of 0.48. With model.prediction=cross, the paper's, ads loses 0.11 to 0.13.
    """
    ours = ranks_of(study, "SyNCRec-seed=0")
    alone = ranks_of(
        study, *(f"SDSR-{name}-seed=0" for name in (HARMED, *RELATED))
    )
    harmed, *related = (
        paired_difference(ours, alone, "full", domain=domain)
        for domain in range(3)
    )
    assert harmed.high > -0.02 and harmed.value > -0.03
    assert all(one.value > 0 for one in related)
    assert any(one.low > 0 for one in related)
