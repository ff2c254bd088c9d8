"""Logs in the seven forms in which people have them, by the commands of docs/data.md, up to recommendations."""

import json
import random
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from launch import prepare as command
from tests.helpers.log_forms import write_delimited
from trainer import Run, fit
from trainer.data.format.dataset import Dataset

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "max_steps": 2,
    "epochs": 1,
    "global_batch_size": 16,
    "model": {
        "dim": 8,
        "ffn_dim": 8,
        "max_length": 8,
        "experts": 2,
        "cross_experts": 1,
        "blocks": 1,
    },
    "stream": {"workers": 0},
    "evaluation": {"negatives": 5},
    "log": {"tensorboard": False},
}
GENRES = ("Action", "Comedy", "Drama")
DAY = 86_400


def sample(users=24, items=30, events=400, seed=2):
    """Events of users 1 … with items 1 …, in seconds; an item has a genre."""
    draw = random.Random(seed)
    rows = []
    for number in range(events):
        item = draw.randrange(1, items + 1)
        rows.append(
            {
                "user_id": draw.randrange(1, users + 1),
                "item_id": item,
                "rating": draw.choice([3, 4, 5, 5, 5, 5]),
                "timestamp": 978_300_000 + number * DAY,
                "domain": GENRES[item % 3],
                "title": f"No. {item} (1995)",
            }
        )
    return pd.DataFrame(rows)


def write_files(folder):
    """Writes the seven logs. Returns the pairs of user and item, as their sources have them."""
    events = sample()
    records = events.to_dict("records")
    names = ["user_id", "item_id", "rating", "timestamp"]
    items = events.drop_duplicates("item_id").to_dict("records")
    for item in items:
        item["class"] = f"{item['domain']} Thriller"
        item["genres"] = f"{item['domain']}|Thriller"
    typed = ["user_id:token", "item_id:token", "rating:float"]
    write_delimited(
        folder / "ml-1m.inter", records, [*typed, "timestamp:float"], "\t"
    )
    write_delimited(
        folder / "ml-1m.item",
        items,
        ["item_id:token", "title:token_seq", "class:token_seq"],
        "\t",
    )
    write_delimited(folder / "ratings.dat", records, names, "::", False)
    write_delimited(
        folder / "movies.dat",
        items,
        ["item_id", "title", "genres"],
        "::",
        False,
    )
    by_pandas(events).to_parquet(folder / "events.parquet")
    dates = events.assign(
        timestamp=pd.to_datetime(events.timestamp, unit="s").dt.strftime(
            "%d/%m/%Y %H:%M"
        )
    )
    dates.to_csv(folder / "export.csv", index=False, sep=";")
    for domain, rows in events.groupby("domain"):
        part = folder / "warehouse/events" / f"domain={domain}"
        part.mkdir(parents=True)
        rows.drop(columns="domain").to_parquet(part / "part-0.parquet")
    reviews = write_reviews(folder / "reviews.jsonl", records)
    two = write_two(folder)
    numbers = set(zip(events.user_id, events.item_id, strict=True))
    liked = events[events.rating >= 4]
    return {
        "recbole": numbers,
        "movielens": set(zip(liked.user_id, liked.item_id, strict=True)),
        "pandas": set(
            by_pandas(events)[["uid", "sku"]].itertuples(index=False, name=None)
        ),
        "office": numbers,
        "hive": numbers,
        "json": reviews,
        "two": two,
    }


def by_pandas(events):
    """Categories, nanoseconds, further columns, and an index that was kept."""
    frame = pd.DataFrame(
        {
            "uid": ("u" + events.user_id.astype(str)).astype("category"),
            "sku": "sku-" + events.item_id.astype(str),
            "service": events.domain.astype("category"),
            "when": pd.to_datetime(events.timestamp, unit="s").astype(
                "datetime64[ns]"
            ),
            "price": 1.5,
        }
    )
    return frame.sample(frac=1.0, random_state=0)


def write_reviews(path, records):
    """Amazon's reviews: texts for ids, lists in other keys, a line cut off."""
    pairs = set()
    with open(path, "w", encoding="utf-8") as stream:
        for event in records:
            review = {
                "reviewerID": f"A{event['user_id']:04d}",
                "asin": f"B{event['item_id']:04d}",
                "helpful": [0, 1],
                "reviewText": 'He said "good",\nand left.',
                "unixReviewTime": event["timestamp"],
            }
            pairs.add((review["reviewerID"], review["asin"]))
            stream.write(json.dumps(review) + "\n")
        stream.write('{"reviewerID": "A0001", "asin": "B00\n')
    return pairs


def write_two(folder):
    """A file a domain, whose users are others."""
    pairs = set()
    for name, delimiter, offset in (
        ("movies_100k.csv", ",", 0),
        ("movies_1m.tsv", "\t", 1000),
    ):
        rows = sample(users=12, events=200, seed=offset).to_dict("records")
        for row in rows:
            row["user_id"] += offset
            row["domain"] = name.partition(".")[0]
            pairs.add((row["user_id"], row["item_id"]))
        names = ["domain", "user_id", "item_id", "timestamp"]
        if offset:
            names = ["timestamp", "item_id", "rating", "user_id", "domain"]
        write_delimited(folder / name, rows, names, delimiter)
    return pairs


def commands():
    """The options of launch/prepare.py that docs/data.md shows, by the output's name."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    by_name = {}
    for line in re.findall(r"^    python launch/prepare.py (.+)$", text, re.M):
        words = shlex.split(line)
        by_name[Path(words[-1]).name] = words
    return by_name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The seven logs, in the folder in which the commands run."""
    folder = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield write_files(folder)


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("name", commands())
def test_from_a_file_to_recommendations_that_join_it(pairs, name, capsys):
    options = command.parse(commands()[name])
    dataset = command.run_engine(options)
    run = fit(dataset, f"runs/{name}", **SETTINGS)
    run.recommend(k=3, keep_seen=True, output=f"out/{name}")
    table = pd.read_parquet(f"out/{name}")
    domains = {domain.name for domain in dataset.domains}
    assert set(table.domain) == domains
    users = {user for user, _ in pairs[name]}
    items = {item for _, item in pairs[name]}
    assert set(table.user_id) == users
    assert set(table.item_id) <= items
    assert len(table) == len(users) * sum(
        min(3, domain.items) for domain in dataset.domains
    )


@pytest.mark.ranks
def test_what_recommend_writes_can_be_prepared(pairs, tmp_path):
    """Also after a run has read it with --input: folders named domain= are read there, too."""
    run = Run.open("runs/hive")
    run.recommend(k=3, logs="warehouse/events", output=tmp_path / "out")
    words = (
        f"--input {tmp_path}/out --time-column rank --output {tmp_path}/data"
    )
    dataset = command.run_engine(command.parse(words.split()))
    assert [domain.name for domain in dataset.domains] == sorted(GENRES)
    assert isinstance(dataset, Dataset)
