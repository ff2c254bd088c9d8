"""The simulated ranks have the users and rows that real ones would have, and the script writes what it finds."""

import json
import sys

import numpy as np
import pytest

from benchmarks import balance, suite
from embeddings.row_scatter import RowScatter
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import StreamConfig
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.stream import TrainBatches

pytestmark = pytest.mark.ranks  # they start processes

HISTORIES = draw_histories(240, longest=30)
LONGEST = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    cuts = range(20, 240, 20)
    return write_dataset(
        tmp_path_factory.mktemp("balance") / "data",
        HISTORIES,
        cuts=cuts,
        streams=6,
        block_users=10,
    )


def run(monkeypatch, dataset, output, *arguments):
    command = [
        "balance.py",
        f"data={dataset.folder}",
        "--json",
        str(output),
        "users_per_rank=10",
    ]
    monkeypatch.setattr(
        sys, "argv", [*command, f"max_length={LONGEST}", *arguments]
    )
    with pytest.raises(SystemExit) as left:
        balance.main()
    return left.value.code


def fed(dataset, ranks, balanced, steps):
    """The batches that real ranks are fed: [[a batch of each rank], …]."""
    plan = BatchSchedule(
        dataset, 10 * ranks, ranks, 0, max_length=LONGEST, balance=balanced
    )
    config, negatives = StreamConfig(workers=0), NegativesConfig(shared=0)
    streams = [
        iter(TrainBatches(plan, rank, 0, LONGEST, "mean", negatives, config))
        for rank in range(ranks)
    ]
    return [[next(stream).batch for stream in streams] for _ in range(steps)]


def real(batch):
    """The rows of a batch's users, without those that fill up."""
    return batch.ids[
        : batch.interactions - 2 * int((batch.weight_B == 0).sum())
    ].numpy()


def test_figures_are_those_of_batches_as_ranks_are_fed_them(
    monkeypatch, dataset, tmp_path
):
    steps = 12
    given = ["ranks=[2,3]", f"steps={steps}", f"row_steps={steps}"]
    assert not run(monkeypatch, dataset, tmp_path / "b.json", *given)
    record = json.loads((tmp_path / "b.json").read_text())
    assert [result["ranks"] for result in record["results"]] == [
        2,
        3,
    ] and record["not_run"] == []
    assert (
        record["dataset"]["users"] == 240
        and record["settings"]["steps"] == steps
    )
    for result in record["results"]:
        ranks, found = result["ranks"], result["tokens"]
        for name, balanced in (("plain", False), ("balanced", True)):
            ratios = []
            for batches in fed(dataset, ranks, balanced, steps):
                tokens = [
                    len(batch.cross.input_M) + len(batch.single.input_M)
                    for batch in batches
                ]
                fill = [int((batch.weight_B == 0).sum()) for batch in batches]
                # Who fills up is a token of input and one of target in each view; the trainer counts one a user too many.
                own = [
                    t + len(b.weight_B) - 3 * f
                    for t, b, f in zip(tokens, batches, fill, strict=True)
                ]
                ratios.append(max(own) / np.mean(own))
            assert found[name]["max"] == pytest.approx(max(ratios), rel=0.02)
            assert found[name]["mean"] == pytest.approx(
                np.mean(ratios), rel=0.01
            )
        assert found["balanced"]["max"] < found["plain"]["max"]
        rows, in_shard = (
            dataset.num_embeddings,
            -(-dataset.num_embeddings // ranks),
        )
        looked_up = [
            [real(batch) for batch in batches]
            for batches in fed(dataset, ranks, True, steps)
        ]
        for name, stored in (
            ("scattered", RowScatter(rows).stored),
            ("unscattered", lambda row: row),
        ):
            for counted, of in (
                ("lookups", lambda ids: ids),
                ("distinct", np.unique),
            ):
                counts = [
                    np.bincount(
                        np.concatenate(
                            [stored(of(ids)) // in_shard for ids in step]
                        ),
                        minlength=ranks,
                    )
                    for step in looked_up
                ]
                ratios, total = (
                    [c.max() / c.mean() for c in counts],
                    np.sum(counts, axis=0),
                )
                assert result["rows"][name][counted]["step"][
                    "mean"
                ] == pytest.approx(np.mean(ratios))
                assert result["rows"][name][counted]["step"][
                    "max"
                ] == pytest.approx(max(ratios))
                assert result["rows"][name][counted]["sum"] == pytest.approx(
                    total.max() / total.mean()
                )


def test_ranks_that_there_are_no_streams_for_are_left_out_with_a_reason(
    monkeypatch, dataset, tmp_path, capfd
):
    assert not run(
        monkeypatch,
        dataset,
        tmp_path / "b.json",
        "ranks=[2,7]",
        "steps=2",
        "row_steps=1",
    )
    record = json.loads((tmp_path / "b.json").read_text())
    assert [left_out["ranks"] for left_out in record["not_run"]] == [7]
    assert "7 ranks, not run: 7 ranks, but" in capfd.readouterr().out
    assert run(monkeypatch, dataset, tmp_path / "c.json", "ranks=[7]") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give data="),
        (["data=x", "ranks=[2,0]"], "ranks is [2, 0]: give at least 1"),
        (
            ["data=x", "--json", "/nowhere/at/all.json"],
            "there is no folder /nowhere/at",
        ),
    ],
)
def test_bad_options_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("balance", balance.Settings, arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_is_no_dataset_is_refused_in_a_line(
    monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(sys, "argv", ["balance.py", f"data={tmp_path}"])
    with pytest.raises(SystemExit) as left:
        balance.main()
    assert (
        left.value.code == 2
        and "is not a dataset folder" in capfd.readouterr().err
    )
