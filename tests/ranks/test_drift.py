"""Popularity that drifts: on the days after training, the counts of the recent past are worth more than the model."""

import json

import pytest

from tests.ranks.conftest import ranks_of, run
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs

pytestmark = pytest.mark.slow
SETTINGS = """
global_batch_size: 64
epochs: 8
model: {dim: 16, ffn_dim: 16, max_length: 48, blocks: 1, experts: 3, cross_experts: 2}
table: {optimizer: adagrad, learning_rate: 0.1}
negatives: {shared: 80}
stream: {workers: 0}
split: {counts: day, whose: all}
"""


def _figures(folder, fashion_days):
    """Test NDCG@10 of a run by the preset `timeline`: of the model alone, and with its recency term."""
    logs = SyntheticConfig(
        users=1500,
        items=240,
        domains=3,
        mean_length=40,
        topics=16,
        fashion_days=fashion_days,
    )
    synthesize_logs(folder / "logs", logs)
    data = folder / "data"
    prepare(PrepareConfig(inputs=(str(folder / "logs"),), output=str(data)))
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS)
    command = ["launch/train.py"]
    for base in ("default", settings, "timeline"):
        command += ["--config", base]
    command += [f"data={data}", f"run={folder / 'run'}"]
    run(ranks_of(2, *command), timeout=1500)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    (test,) = [
        record for record in map(json.loads, lines) if record["kind"] == "test"
    ]
    return test["mean"]["NDCG@10"], test["with_recency_mean"]["NDCG@10"]


def test_counts_make_up_for_what_the_model_has_not_seen(tmp_path):
    alone, with_counts = _figures(tmp_path, fashion_days=30)
    assert with_counts > 1.03 * alone  # 1.06 when written


def test_where_nothing_drifts_counts_cost_nothing(tmp_path):
    alone, with_counts = _figures(tmp_path, fashion_days=0)
    assert 0.99 * alone < with_counts < 1.02 * alone
