"""A trained model is ranked by `launch/evaluate.py`: the same figures by any number of ranks, from any candidates' file."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launch.evaluate
from tests.helpers.alone import as_a_script
from tests.helpers.made import draw_histories, write_dataset
from tests.ranks.conftest import ranks_of, run
from trainer.config.load import load_config
from trainer.data.format.dataset import Dataset
from trainer.evaluation.sampled import RankingBatches


@pytest.fixture
def evaluate(trained, monkeypatch, capsys):
    """`launch/evaluate.py --json` in this process, as the only rank: its record, or the one line of its refusal."""

    def main(*options):
        arguments = ["--run", trained, "--json", *options]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        with as_a_script():
            try:
                launch.evaluate.main()
            except SystemExit as left:
                output = capsys.readouterr()
                assert left.code == 2 and output.out == ""
                errors = [
                    line for line in output.err.splitlines() if line.strip()
                ]
                assert len(errors) == 1 and errors[0].startswith("error: ")
                return errors[0]
        return json.loads(capsys.readouterr().out)

    return main


def results(file):
    """{user_id: (domain, rank, scores)} of an --output file."""
    rows = pq.read_table(file).to_pylist()
    found = {
        row["user_id"]: (row["domain"], row["rank"], np.array(row["scores"]))
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def assert_same_results(one, other):
    assert one.keys() == other.keys()
    for user, (domain, rank, scores) in one.items():
        assert other[user][:2] == (domain, rank)
        np.testing.assert_allclose(other[user][2], scores, rtol=1e-4, atol=1e-6)


def recorded(trained, kind):
    records = [
        json.loads(line)
        for line in (trained / "metrics.jsonl").read_text().splitlines()
    ]
    (record,) = (record for record in records if record["kind"] == kind)
    times = ("seconds", "validation_seconds")
    return {key: value for key, value in record.items() if key not in times}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_figures_are_those_that_the_run_wrote(trained, evaluate, split):
    found = evaluate("--split", split)
    assert found == recorded(trained, split)
    assert found["step"] == 3 and found["mean"]["MRR"] > 0
    facts = json.loads((trained / "best.json").read_text())
    assert (
        facts["NDCG@10"] == recorded(trained, "validation")["mean"]["NDCG@10"]
    )


def test_two_ranks_give_the_same_figures_and_the_same_file(
    dataset, trained, evaluate, tmp_path
):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    alone = evaluate("--output", one, "--recency-term")
    assert alone["recency_mean"]["MRR"] > 0
    assert alone["with_recency_mean"]["MRR"] > 0
    done = run(
        ranks_of(
            2,
            "launch/evaluate.py",
            "--run",
            trained,
            "--json",
            "--recency-term",
            "--output",
            two,
        )
    )
    (line,) = (
        line for line in done.stdout.splitlines() if line.startswith("{")
    )
    assert json.loads(line) == alone
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.parquet",
        "two.parquet",
    ]
    assert_same_results(results(one), results(two))
    facts = Dataset.load(dataset)
    assert (
        len(results(one))
        == facts.users - facts.too_short
        == sum(d["users"] for d in alone["domains"].values())
    )
    order = (
        pq.read_table(dataset / "users.parquet").column("user_id").to_pylist()
    )
    users = [
        pq.read_table(file).column("user_id").to_pylist() for file in (one, two)
    ]
    assert (
        users[0] == users[1] == [user for user in order if user in results(one)]
    )


def test_full_ranking_gives_the_same_figures_by_two_ranks_and_leaves_them_in_the_run(
    dataset, trained, evaluate, tmp_path
):
    own = tmp_path / "run"
    shutil.copytree(trained, own)
    alone = evaluate("--run", own, "--ranking", "full")
    assert json.loads((own / "evaluation-full-test.json").read_text()) == alone
    assert "among all items of the domain" in (own / "report.html").read_text()
    (own / "evaluation-full-test.json").unlink()
    done = run(
        ranks_of(
            2, "launch/evaluate.py", "--run", own, "--json", "--ranking", "full"
        )
    )
    (line,) = (
        line for line in done.stdout.splitlines() if line.startswith("{")
    )
    assert (
        json.loads(line)
        == alone
        == json.loads((own / "evaluation-full-test.json").read_text())
    )
    assert alone["sampled"] == recorded(trained, "test")
    facts = Dataset.load(dataset)
    for domain in facts.domains:
        figures, sampled = (
            alone["domains"][domain.name],
            alone["sampled"]["domains"][domain.name],
        )
        assert figures["users"] == sampled["users"]
        assert (
            figures["MRR"] <= sampled["MRR"] + 1e-9
        )  # more items may come before
        for groups in alone["breakdown"][domain.name].values():
            assert (
                sum(group["users"] for group in groups.values())
                == figures["users"]
            )
        low, high = figures["interval"]["MRR"]
        assert low < figures["MRR"] < high


def test_full_ranking_is_a_table_too(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "run")
    arguments = [
        "--run",
        tmp_path / "run",
        "--ranking",
        "full",
        "--split",
        "validation",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with as_a_script():
        launch.evaluate.main()
    shown = capsys.readouterr().out
    words = (
        "Validation",
        "item popularity",
        "head",
        "history length",
        "history in domain",
        "gini",
        "drawn candidates",
    )
    assert all(word in shown for word in words)
    assert (tmp_path / "run" / "evaluation-full-validation.json").is_file()


def candidates_of(dataset, trained):
    """The drawn test candidates with their raw ids, as another system would be given them."""
    config = load_config([trained / "config.yaml"], [])
    users = (
        pq.read_table(dataset.folder / "users.parquet")
        .column("user_id")
        .to_pylist()
    )
    item_id = {}
    for domain in dataset.domains:
        table = pq.read_table(dataset.folder / domain.vocabulary)
        item_id |= zip(
            table["row"].to_pylist(), table["item_id"].to_pylist(), strict=True
        )
    batches = RankingBatches(
        dataset,
        0,
        1,
        config.evaluation,
        config.model.max_length,
        "test",
        config.seed,
    )
    rows = []
    for batch in batches:
        ends = np.cumsum(batch.counts_B)
        for user, begin, end in zip(
            batch.user_B, ends - batch.counts_B, ends, strict=True
        ):
            positive, *negatives = (
                item_id[row] for row in batch.rows_C[begin:end].tolist()
            )
            domain = dataset.domains[
                int(dataset.domain_of(batch.rows_C[begin]))
            ].name
            rows.append(
                {
                    "user_id": users[user],
                    "positive": positive,
                    "negatives": negatives,
                    "domain": domain,
                }
            )
    return rows


def test_candidates_fed_back_get_the_same_ranks(
    dataset, trained, evaluate, tmp_path
):
    drawn, given, part = (
        tmp_path / f"{name}.parquet" for name in ("drawn", "given", "part")
    )
    expected = evaluate("--output", drawn)
    rows = candidates_of(Dataset.load(dataset), trained)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "candidates.parquet")
    assert (
        evaluate(
            "--candidates", tmp_path / "candidates.parquet", "--output", given
        )
        == expected
    )
    assert_same_results(results(drawn), results(given))

    # Some of the users, in another order, with their negatives turned round: the same ranks still.
    rows = [row | {"negatives": row["negatives"][::-1]} for row in rows[::-3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    evaluate("--candidates", tmp_path / "some.parquet", "--output", part)
    turned = {
        user: (d, rank, np.append(s[:1], s[:0:-1]))
        for user, (d, rank, s) in results(part).items()
    }
    chosen = {row["user_id"] for row in rows}
    assert_same_results(
        {
            user: values
            for user, values in results(drawn).items()
            if user in chosen
        },
        turned,
    )


def no_run(trained, folder):
    return ["--run", folder], "config.yaml"


def unfinished(trained, folder):
    shutil.copytree(trained, folder / "run")
    (folder / "run" / "best.json").unlink()
    return ["--run", folder / "run"], "best.json"


def table_file_missing(trained, folder):
    shutil.copytree(trained, folder / "run")
    next((folder / "run").glob("checkpoints/*/table-*")).unlink()
    return [
        "--run",
        folder / "run",
    ], "table-00000-of-00001.safetensors is missing"


def dense_file_cut_short(trained, folder):
    shutil.copytree(trained, folder / "run")
    file = next((folder / "run").glob("checkpoints/*/dense*"))
    file.write_bytes(file.read_bytes()[:-10])
    return ["--run", folder / "run"], "bytes, the manifest says"


def another_dataset(trained, folder):
    write_dataset(folder / "other", draw_histories(9))
    return [
        "--data",
        folder / "other",
    ], "knows none of the domains domain 0, domain 1"


def moved_dataset(trained, folder):
    return ["--data", folder / "nowhere"], "nowhere"


def bad_candidates(trained, folder):
    pq.write_table(
        pa.table({"user_id": ["?"], "positive": ["?"], "negatives": [["?"]]}),
        folder / "c.parquet",
    )
    return ["--candidates", folder / "c.parquet"], "row 0"


def candidates_and_all_items(trained, folder):
    return [
        "--candidates",
        folder / "c.parquet",
        "--ranking",
        "full",
    ], "leave one of them out"


def output_exists(trained, folder):
    (folder / "out.parquet").touch()
    return [], "already exists"


BAD = [
    no_run, unfinished, table_file_missing, dense_file_cut_short, another_dataset, moved_dataset, bad_candidates,
    candidates_and_all_items, output_exists
]  # fmt: skip


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__ for spoil in BAD])
def test_what_cannot_be_ranked_is_one_line_and_leaves_nothing(
    trained, evaluate, tmp_path, spoil
):
    options, named = spoil(trained, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert named in evaluate(*options, "--output", tmp_path / "out.parquet")
    assert sorted(tmp_path.rglob("*")) == before


def test_results_are_given_up_where_a_shard_is_broken(
    dataset, trained, evaluate, tmp_path
):
    shutil.copytree(dataset, tmp_path / "data")
    shard = sorted((tmp_path / "data" / "shards").iterdir())[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert shard.name in evaluate(
        "--data", tmp_path / "data", "--output", tmp_path / "out.parquet"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
