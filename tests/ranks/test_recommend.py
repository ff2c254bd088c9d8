"""`launch/recommend.py` gives the same files by any number of ranks, from the logs or the dataset, killed or not."""

import json

import pyarrow.parquet as pq
import pytest

from tests.helpers import HELPERS
from tests.ranks.conftest import BIN, ranks_of, run
from trainer.data.format.dataset import Dataset

KILLED = HELPERS.joinpath("killed.py")
LOST = 4  # trainer.errors.LostRanks; DeepSpeed's launcher gives the status of the rank that it sees first


def recommend(
    trained,
    output,
    *options,
    ranks=1,
    script="launch/recommend.py",
    status=(0,),
    **environment,
):
    arguments = ["--run", trained, "--output", output, "--json", *options]
    command = (
        ranks_of(ranks, script, *arguments)
        if ranks > 1
        else [BIN / "python", script, *map(str, arguments)]
    )
    done = run(command, status=status, OMP_NUM_THREADS="1", **environment)
    lines = [
        json.loads(line)
        for line in done.stdout.splitlines()
        if line.startswith("{")
    ]
    return lines[0] if lines else done


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.parquet")
    }


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """What one rank makes in parts of 90 users."""
    output = tmp_path_factory.mktemp("alone") / "out"
    record = recommend(trained, output, "--part-users", 90, "--batch-size", 16)
    return output, record


def test_every_user_is_there_once_with_k_items_of_each_domain(dataset, alone):
    output, record = alone
    facts = Dataset.load(dataset)
    ids = pq.read_table(dataset / "users.parquet")["user_id"].to_pylist()
    for domain in facts.domains:
        files = sorted((output / f"domain={domain.name}").iterdir())
        assert len(files) == -(-len(ids) // 90)
        rows = [
            row
            for file in files
            for row in pq.ParquetFile(file).read().to_pylist()
        ]
        assert [(row["user_id"], row["rank"]) for row in rows] == [
            (user, rank) for user in ids for rank in range(1, 11)
        ]
        assert record["rows"][domain.name] == len(rows)


def test_three_ranks_give_the_same_bytes(trained, alone, tmp_path):
    # 90 users are two steps of 16 users a rank, the last of which has fewer users for one of them.
    assert (
        recommend(
            trained,
            tmp_path / "out",
            "--part-users",
            90,
            "--batch-size",
            16,
            ranks=3,
        )
        == alone[1]
    )
    assert contents(tmp_path / "out") == contents(alone[0])


def test_parts_are_scored_together_where_there_are_more_ranks_than_steps_in_one(
    trained, tmp_path
):
    """Two steps of 64 users in a part of 90, three ranks: two parts at once, the last one alone."""
    options = ("--part-users", 90, "--batch-size", 64)
    record = recommend(trained, tmp_path / "alone", *options)
    assert recommend(trained, tmp_path / "out", *options, ranks=3) == record
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_killed_half_way_the_same_command_finishes_at_another_number_of_ranks(
    trained, alone, tmp_path
):
    output, options = tmp_path / "out", ("--part-users", 90, "--batch-size", 16)
    recommend(
        trained,
        output,
        *options,
        ranks=2,
        script=KILLED,
        status=(256 - 9, LOST),
        KILL_AFTER="1",
    )
    assert (
        not output.exists()
        and (tmp_path / ".out.work" / "parts" / "00000").is_dir()
    )
    recommend(
        trained,
        output,
        *options,
        ranks=1,
        script=KILLED,
        status=(-9,),
        KILL_AFTER="2",
    )
    assert (
        not output.exists()
        and len(list((tmp_path / ".out.work" / "parts").glob("?????"))) == 3
    )
    assert recommend(trained, output, *options, ranks=2) == alone[1]
    assert contents(output) == contents(alone[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_logs_give_what_the_dataset_that_was_made_from_them_gives(
    dataset, trained, alone, tmp_path
):
    record = recommend(
        trained, tmp_path / "out", "--input", dataset.parent / "logs"
    )
    counts = {
        "unknown_domain": 0,
        "unknown_item": 0,
        "without_history": 0,
        "users": alone[1]["users"],
    }
    assert record.items() >= counts.items()

    def rows(folder):
        found = [
            pq.ParquetFile(file).read().to_pylist()
            for file in sorted(folder.glob("domain=*/*"))
        ]
        return sorted(
            (row["user_id"], row["item_id"], row["rank"], row["history"])
            for part in found
            for row in part
        )

    assert rows(tmp_path / "out") == rows(alone[0])


def test_a_refusal_is_one_line_by_the_first_rank(trained, tmp_path):
    (tmp_path / "users.csv").write_text("user_id\n1\n,\n")
    done = recommend(
        trained,
        tmp_path / "out",
        "--users",
        tmp_path / "users.csv",
        ranks=2,
        status=(2,),
    )
    lines = [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ]
    assert len(lines) == 1 and "users.csv" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["users.csv"]
