import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[3]


def run(script, *arguments, cwd=ROOT):
    command = [
        sys.executable,
        str(ROOT / "launch" / script),
        *map(str, arguments),
    ]
    return subprocess.run(
        command,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_synthetic_log_is_made_and_prepared(tmp_path):
    made = run(
        "synthesize.py",
        "--output",
        tmp_path / "logs",
        "--users",
        60,
        "--items",
        200,
        "--mean-length",
        9,
    )
    assert (made.returncode, made.stderr) == (0, "")
    count = json.loads((tmp_path / "logs/_truth.json").read_text())[
        "interactions"
    ]
    assert f"{count:,}" in made.stdout
    done = run(
        "prepare.py",
        "--input",
        "logs",
        "--output",
        "out/[red]set",
        "--streams",
        7,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "out/[red]set: 60 users in 7 shards",
        "shop",
        "ads",
        "p95",
        f"{count:,}",
        "too short",
    ):
        assert word in done.stdout
    files = sorted(path.name for path in (tmp_path / "out/[red]set").iterdir())
    assert files == [
        "dataset.json",
        "lengths.npy",
        "overlap.json",
        "shards",
        "users.parquet",
        "vocabulary",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["[red]set"]


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        (
            "user_id,item_id,timestamp\n1,2,3\n",
            [],
            "no column 'domain'; it has user_id, item_id, timestamp",
        ),
        (
            "user_id,item_id,domain,timestamp\n1,2,a,3\n1,,a,3\n",
            [],
            "log.csv: row 2: 'item_id' is empty",
        ),
        (
            "user_id,item_id,domain,timestamp\n1,2,a,3\n1,2\n",
            [],
            "log.csv cannot be read",
        ),
        (
            "user_id,item_id,domain,timestamp\n1,2,a,3\n",
            [],
            "domain 'a' has one item",
        ),
        (
            "user_id,item_id,domain,timestamp\n1,2,a,3\n1,3,a,4\n",
            ["--min-user", "3"],
            "nothing is left",
        ),
        ("", ["--input", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_log_that_cannot_be_used_is_one_line_and_status_2(
    tmp_path, text, options, named
):
    (tmp_path / "log.csv").write_text(text)
    done = run(
        "prepare.py",
        "--input",
        "log.csv",
        "--output",
        "out",
        *options,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and named in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_config_that_cannot_be_used_is_one_line_and_status_2(tmp_path):
    done = run("synthesize.py", "--output", tmp_path / "logs", "--items", 5)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: items is 5")
        and done.stderr.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []
