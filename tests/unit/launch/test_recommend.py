import json
import sys

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launch.recommend import main, parse
from tests.helpers.alone import as_a_script
from tests.helpers.runs import finished_run, rank_of_one
from trainer.data.format.dataset import USERS
from trainer.reporting.command_tables import recommendation_table, user_table

COUNTS = {
    "users": 1200,
    "without_history": 3,
    "unknown_domain": 0,
    "unknown_item": 41,
    "unread": 0,
}
RECORD = COUNTS | {"rows": {"[red]shop": 12000}}


def test_the_table_says_how_many_and_what_was_left_out():
    console = Console(width=120)
    with console.capture() as shown:
        console.print(recommendation_table("out/[b]", RECORD))
    text = " ".join(shown.get().split())
    for words in (
        "out/[b]: 1,200 users, 3 of them without a history",
        "[red]shop",
        "12,000",
        "41 interactions with items",
    ):
        assert words in text
    assert (
        "domains that the model does not know" not in text
        and "damaged" not in text
    )


def test_options_are_as_the_paper_s_service_asks():
    options = parse(
        [
            "--run",
            "r",
            "--output",
            "o",
            "-k",
            "1",
            "--domain",
            "shop",
            "--domain",
            "video",
            "--local_rank=0",
        ]
    )
    assert (options.k, options.domain, options.input) == (
        1,
        ["shop", "video"],
        (),
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--output o", "--run"),
        ("--run r", "--output DIR is missing"),
        ("--run r --user 7 --output o", "--user shows recommendations"),
        ("--run r --user 7 --users f", "--user shows recommendations"),
        ("--run no-such-run --user 7", "no-such-run"),
    ],
)
def test_what_is_needed_is_asked_for(words, named, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recommend.py", *words.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_one_user_is_shown_and_nothing_is_written(
    tmp_path, capsys, monkeypatch
):
    """By its id as text; the ids of the dataset may be numbers."""
    with rank_of_one() as ranks:
        run = finished_run(tmp_path, ranks)
    before = sorted(path.name for path in run.folder.iterdir())
    users = pq.read_table(run.dataset.local(USERS))["user_id"].to_pylist()
    words = ["--run", str(run.folder), "--user", str(users[3]), "-k", "2"]
    shown = []
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["recommend.py", *words, *more])
        with as_a_script():
            main()
        shown.append(capsys.readouterr().out)
    rows = json.loads(shown[1])
    assert [row["rank"] for row in rows] == [1, 2, 1, 2]
    assert {row["user_id"] for row in rows} == {users[3]}
    for word in (str(users[3]), "domain 0", "domain 1", rows[0]["item_id"]):
        assert str(word) in shown[0]
    assert sorted(path.name for path in run.folder.iterdir()) == before


def test_a_new_user_is_told_so():
    row = {"user_id": "[x]", "history": 0, "domain": "d", "rank": 1}
    console = Console(width=100)
    with console.capture() as shown:
        console.print(user_table([row | {"item_id": 5, "score": 0.25}]))
    assert "[x]: new to the model" in shown.get()
    assert "0.2500" in shown.get()
