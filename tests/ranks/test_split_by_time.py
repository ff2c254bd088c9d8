"""A split by time is the same by any number of ranks: what is trained, what is ranked, and where the cuts are."""

import json

import pyarrow.parquet as pq
import pytest

from tests.ranks.conftest import MODEL, SETTINGS, ranks_of, run

SPLIT = [
    "split.kind=timeline",
    "split.validation=0.1",
    "split.test=0.1",
    "split.whose=all",
    "model.dropout=0",
]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The same run by one rank and by two: {ranks: folder}."""
    folder = tmp_path_factory.mktemp("timeline")
    found = {}
    for ranks in (1, 2):
        found[ranks] = folder / str(ranks)
        arguments = [f"data={dataset}", f"run={found[ranks]}"]
        run(
            ranks_of(
                ranks,
                "launch/train.py",
                *arguments,
                *SETTINGS,
                *MODEL,
                *SPLIT,
            )
        )
    return found


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(line) for line in lines]
    return [record for record in every if record["kind"] == kind]


def test_two_ranks_train_the_same(runs):
    assert (runs[1] / "split.json").read_text() == (
        runs[2] / "split.json"
    ).read_text()
    for one, two in zip(
        records(runs[1], "train"), records(runs[2], "train"), strict=True
    ):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    (one,), (two,) = records(runs[1], "test"), records(runs[2], "test")
    for name in ("split", "mean_domains"):
        assert one[name] == two[name]
    assert one["unseen"]["items"] == two["unseen"]["items"]
    assert one["unseen"]["popularity"] == two["unseen"]["popularity"]
    assert one["popularity"] == two["popularity"]
    assert one["split"]["without_history"] >= 0
    assert sum(row["users"] for row in one["domains"].values()) > 400


def test_two_ranks_rank_the_same(runs, tmp_path):
    """All events of a user, among all items: each one's position too."""
    found = []
    for ranks in (1, 2):
        done = run(
            ranks_of(
                ranks,
                "launch/evaluate.py",
                "--run",
                runs[1],
                "--json",
                "--ranking",
                "full",
                "--output",
                tmp_path / f"{ranks}.parquet",
            )
        )
        lines = done.stdout.splitlines()
        (line,) = (line for line in lines if line.startswith("{"))
        positions = pq.read_table(runs[1] / "ranks-test.parquet")
        found.append((json.loads(line), positions.to_pydict()))
    assert found[0] == found[1]
    record, positions = found[0]
    (test,) = records(runs[1], "test")
    assert record["sampled"]["domains"] == test["domains"]
    targets = positions["target"]
    assert targets == list(range(len(targets)))
    assert len(set(positions["user"])) < len(targets)
    outputs = [pq.read_table(tmp_path / f"{ranks}.parquet") for ranks in (1, 2)]
    for column in ("user_id", "domain", "rank"):
        assert outputs[0][column].to_pylist() == outputs[1][column].to_pylist()


def test_given_candidates_name_one_event_of_a_user(runs, tmp_path):
    file = tmp_path / "given.parquet"
    file.touch()
    done = run(
        ranks_of(
            1, "launch/evaluate.py", "--run", runs[1], "--candidates", file
        ),
        status=(2,),
    )
    assert "split.whose=all" in done.stderr
