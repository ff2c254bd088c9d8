"""A log is cut into days without a row lost, what is done is not done again, and the record says what its runs say."""

import json
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import retraining, suite

USERS, EACH, ITEMS = 60, 12, 20


@pytest.fixture
def log(tmp_path):
    """Two domains, times in no order, several at the same."""
    random = np.random.default_rng(1)
    rows = USERS * EACH
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(USERS), EACH),
            "item_id": [
                f"{'ab'[i % 2]}{n}"
                for i, n in enumerate(random.integers(0, ITEMS, rows))
            ],
            "domain": ["ab"[i % 2] for i in range(rows)],
            "timestamp": random.integers(1, 200, rows),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def settings_of(log, *given):
    return suite.settings(
        "retraining", retraining.Settings, [f"log={log}", "--short", *given]
    )[0]


def test_every_row_is_of_one_part_and_no_part_is_older_than_the_one_before(
    log, tmp_path
):
    files, facts = retraining.cut(
        settings_of(log, "days=3", "share=0.1"), tmp_path
    )
    parts = [pq.read_table(file) for file in files]
    assert [len(part) for part in parts] == [
        fact["interactions"] for fact in facts
    ] and len(parts) == 4
    whole = pa.concat_tables(parts).sort_by(
        [(name, "ascending") for name in parts[0].column_names]
    )
    assert whole.equals(
        pq.read_table(log).sort_by(
            [(name, "ascending") for name in parts[0].column_names]
        )
    )
    times = [part["timestamp"].to_numpy() for part in parts]
    assert all(before.max() < after.min() for before, after in pairwise(times))
    assert all(40 < len(time) < 110 for time in times[1:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["days=0"], "days is 0"),
        (["days=10", "share=0.1"], "have to leave something"),
    ],
)
def test_bad_settings_are_refused(log, given, message, capsys):
    with pytest.raises(SystemExit):
        settings_of(log, *given)
    assert message in capsys.readouterr().err


def test_no_log_is_refused(capsys):
    with pytest.raises(SystemExit):
        suite.settings("retraining", retraining.Settings, [])
    assert "give log=FILE.parquet" in capsys.readouterr().err


@pytest.mark.ranks
def test_what_is_done_is_not_done_again_and_what_fails_ends_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\nprint(1)\nfile = pathlib.Path(sys.argv[1])\nfile.mkdir()\n"
    )
    seconds = retraining.once(tmp_path, "a", [script, tmp_path / "there"])
    assert (
        seconds > 0
        and retraining.once(tmp_path, "a", [script, tmp_path / "there"])
        == seconds
    )
    with pytest.raises(SystemExit, match="ended with status 1"):
        retraining.once(tmp_path, "b", [script, tmp_path / "there"])
    assert not (tmp_path / "b.seconds").exists()


@pytest.mark.slow  # nine processes that import torch
@pytest.mark.timeout(600)
def test_a_day_is_trained_both_ways_and_ranked_on_the_same_items(
    log, tmp_path, monkeypatch
):
    result = tmp_path / "result.json"
    tiny = "settings=[stream.workers=0,epochs=1,global_batch_size=16,model.dim=8,model.ffn_dim=8,model.max_length=8]"
    given = [
        f"log={log}",
        f"folder={tmp_path}",
        "days=1",
        "share=0.1",
        tiny,
        "warm_settings=[warm_kept=0.5]",
    ]
    monkeypatch.setattr(
        sys, "argv", ["retraining.py", "--json", str(result), "--short", *given]
    )
    retraining.main()
    record = json.loads(result.read_text())
    (day,) = record["results"]
    assert str(tmp_path) not in result.read_text()
    for kind in ("warm", "scratch"):
        assert day[kind]["epochs"] == 1 and day[kind]["seconds"] > 0
        figures = dict(day[kind]["mean"])
        assert figures.pop("mean") == pytest.approx(
            np.mean(list(figures.values()))
        ) and set(figures) == {"a", "b"}
    assert f"{day['warm']['mean']['mean']:.4f}" in retraining.table(record)
    ElementTree.parse(result.with_suffix(".svg"))
