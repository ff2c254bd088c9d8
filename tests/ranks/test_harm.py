"""Only harm is corrected: trained on logs in which two domains harm a third, and on logs without harm."""

import json

import pytest

from tests.helpers.rank_processes import forked_python, run_alone
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs
from trainer.evaluation.user_ranks import read_ranks
from trainer.study.results import RunResult, collect_results, paired_difference

pytestmark = pytest.mark.slow
HARMED = "ads"
BASE = """
global_batch_size: 64
epochs: 12
model: {dim: 16, ffn_dim: 16, max_length: 48, blocks: 1, experts: 3, cross_experts: 2, time_knots: 0,
        loss_correction: harm, stop_gradient: off, mutual_information: off}
table: {optimizer: adagrad, learning_rate: 0.1}
negatives: {shared: 80}
evaluation: {patience: 3}
stream: {workers: 0}
"""
_NOT_COMPARED = {
    "validation": 0.0,
    "seconds": 0.0,
    "users_per_second": 0.0,
    "epochs": 0,
}


def _study(folder, systems, **synthetic):
    """A study of three domains; returns the folder of its runs."""
    logs = SyntheticConfig(
        users=1500,
        items=240,
        domains=3,
        mean_length=40,
        topics=16,
        **synthetic,
    )
    synthesize_logs(folder / "logs", logs)
    data = folder / "data"
    prepare(PrepareConfig(inputs=(str(folder / "logs"),), output=str(data)))
    base = folder / "base.yaml"
    base.write_text(BASE)
    command = ["launch/study.py", "--data", data, "--base", base]
    command += ["--output", folder / "study", "parallel=2"]
    command += [f"systems=[{systems}]"]
    done = run_alone(*command, timeout=3000, FORKED_PYTHON=forked_python())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "study" / "runs"


def _weights(runs):
    """λ of every log line of training, from the fourth epoch on."""
    file = runs / "SyNCRec-seed=0" / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    return [record["lambda"] for record in train if record["epoch"] > 2]


def _results(runs, *names):
    """The test positions of one seed, of a system's run or of its runs by domain."""
    parts = []
    for name in names:
        file = runs / f"{name}-seed=0" / "run" / "ranks-test.parquet"
        parts.append(RunResult(**read_ranks(file), **_NOT_COMPARED))
    return collect_results("one", [parts])


def test_the_harmed_domain_is_corrected_and_keeps_what_it_has_alone(tmp_path):
    runs = _study(tmp_path, "SyNCRec,SDSR")
    for weights in _weights(runs):
        assert weights.pop(HARMED) < 0.8
        assert set(weights.values()) == {1}
    domains = (HARMED, "shop", "video")
    alone = _results(runs, *(f"SDSR-{name}" for name in domains))
    ours = _results(runs, "SyNCRec")
    harmed, *related = (
        paired_difference(ours, alone, "full", domain=domain)
        for domain in range(3)
    )
    assert harmed.high > -0.005 and harmed.value > -0.02
    assert all(difference.low > 0 for difference in related)


def test_without_harm_every_domain_weighs_one_and_the_model_is_an_mmoe(
    tmp_path,
):
    runs = _study(tmp_path, "SyNCRec,MMoE", unrelated_share=0)
    for weights in _weights(runs):
        assert set(weights.values()) == {1}
    ours = _results(runs, "SyNCRec")
    mmoe = _results(runs, "MMoE")
    difference = paired_difference(ours, mmoe, "full")
    assert difference.low < 0 < difference.high or abs(difference.value) < 0.01
