import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.made import draw_histories, write_dataset
from tests.helpers.runs import rank_of_one
from trainer.config.load import load_config
from trainer.reporting.run_log import read_records
from trainer.training.loop import train

PRESETS = Path(__file__).parents[3] / "launch" / "configs"
SMALL = [
    "model.dim=8",
    "model.ffn_dim=8",
    "global_batch_size=8",
    "epochs=2",
    "log.every=2",
    "stream.workers=0",
]


@pytest.mark.parametrize("preset", ["sasrec", "gru4rec"])
def test_the_presets_of_one_task_train_log_and_are_evaluated_without_what_two_tasks_give(
    tmp_path, preset
):
    data = write_dataset(tmp_path / "data", draw_histories(40)).folder
    run = tmp_path / "run"
    with rank_of_one() as ranks:
        test = train(
            load_config(
                [PRESETS / f"{preset}.yaml"],
                [f"data={data}", f"run={run}", *SMALL],
            ),
            ranks,
        )
    records = read_records(run / "metrics.jsonl")
    assert [
        record["kind"] for record in records if record["kind"] != "train"
    ] == [
        "validation",
        "validation",
        "test",
    ]
    assert (
        records[-1]["mean"] == json.loads(json.dumps(test["mean"]))
        and test["mean"]["NDCG@10"] > 0
    )
    for record in records:
        if record["kind"] == "train":
            assert (
                record["loss"] == pytest.approx(record["loss_cross"], rel=1e-5)
                and record["loss_single"] is None
            )
            assert any(record["cross_by_domain"].values())
            assert not any(
                value is not None
                for name in ("lambda", "phi")
                for value in record[name].values()
            )
            assert record["alpha"] is None
            assert record["mutual_information"] is None
    page = (run / "report.html").read_text()
    assert "negative transfer:" not in page and "Smallest λ" not in page


def test_one_task_with_shapley_values_logs_lambda_and_no_gap(tmp_path):
    data = write_dataset(tmp_path / "data", draw_histories(40)).folder
    run, own = (
        tmp_path / "run",
        ["model.loss_correction=shapley", "model.correction_temperature=0.05"],
    )
    with rank_of_one() as ranks:
        train(
            load_config(
                [PRESETS / "gru4rec.yaml"],
                [f"data={data}", f"run={run}", *SMALL, *own],
            ),
            ranks,
        )
    steps = [
        record
        for record in read_records(run / "metrics.jsonl")
        if record["kind"] == "train"
    ]
    for record in steps:
        assert np.mean([*record["lambda"].values()]) == pytest.approx(
            1, abs=1e-5
        )
        assert (
            not any(value is not None for value in record["phi"].values())
            and record["alpha"] is None
        )
    page = (run / "report.html").read_text()
    assert "negative transfer:" not in page and "Smallest λ" in page
