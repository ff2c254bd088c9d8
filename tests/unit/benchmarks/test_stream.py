"""The script measures what it says, its figures add up, and it leaves nothing."""

import json
import sys

import numpy as np
import pytest
import torch
import webdataset

from benchmarks import stream, suite
from tests.helpers.made import write_dataset
from trainer.data.format.dataset import Dataset

NAMES = [
    "ready, workers: 1",
    "ready, workers: 2",
    "all in one process",
    "assign",
    "read",
    "build",
    "open",
    "decode",
    "raw from disk",
    "raw from cache",
    "webdataset",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def histories():
    """Rows of M by user: 1 to 12 of them, in the rows 0 … 4 and 8 … 11."""
    generator = np.random.default_rng(0)
    return [
        generator.choice([0, 1, 2, 3, 4, 8, 9, 10, 11], 1 + user % 12).tolist()
        for user in range(40)
    ]


@pytest.fixture
def data(tmp_path, histories):
    write_dataset(
        tmp_path / "data", histories, cuts=(13, 22), streams=3, block_users=4
    )
    return tmp_path / "data"


def tokens(histories, longest):
    """By the rule: a user of 3 or more interactions keeps two of them from training, and the newest `longest` are seen."""
    return sum(
        min(longest, len(history) - 2 * (len(history) >= 3))
        for history in histories
    )


def setting(data, **given):
    facts = dict(
        batch_size=6,
        max_length=5,
        shared=3,
        workers=[1],
        batches=3,
        shards=2,
        samples=9,
        repeats=1,
    )
    return stream.Setting(
        Dataset.load(data),
        stream.Settings(data=str(data), users=0, folder="", **facts | given),
    )


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stream.py", *map(str, arguments)])
    stream.main()


@pytest.mark.ranks
def test_all_is_measured_and_written(
    monkeypatch, tmp_path, data, histories, capsys
):
    file, scratch = tmp_path / "result.json", tmp_path / "scratch"
    scratch.mkdir()
    given = (
        "batch_size=6",
        "max_length=5",
        "shared=3",
        "batches=3",
        "samples=9",
        "repeats=3",
    )
    run_main(
        monkeypatch, f"data={data}", *given, f"folder={scratch}", "--json", file
    )
    assert list(scratch.iterdir()) == []

    record = json.loads(file.read_text())
    lines = {line["name"]: line for line in record["results"]}
    assert list(lines) == NAMES
    assert (
        record["round"] == 2
        and record["measured"] == 4
        and record["settings"]["data"] == "data"
    )
    for line in lines.values():
        seconds = line["seconds"]
        assert (
            len(seconds["all"]) == 3
            and 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        )
        assert line["users_per_second"] == pytest.approx(
            line["users"] / seconds["median"]
        )
        assert line["tokens_per_second"] == pytest.approx(
            line["tokens"] / seconds["median"]
        )
    fed = {(lines[name]["users"], lines[name]["tokens"]) for name in NAMES[:6]}
    assert len(fed) == 1  # whoever builds them, the batches are the same
    for name in ("open", "decode", "raw from disk", "raw from cache"):
        line = lines[name]
        assert (line["users"], line["tokens"]) == (40, tokens(histories, 5))
        assert line["bytes"] == sum(
            path.stat().st_size for path in (data / "shards").iterdir()
        )
        assert line["bytes_per_second"] == pytest.approx(
            line["bytes"] / line["seconds"]["median"]
        )
    two, opening = lines["ready, workers: 2"], lines["open"]
    assert two["users_per_second_and_worker"] == two["users_per_second"] / 2
    slower = 1 / two["users_per_second"] + 1 / opening["users_per_second"]
    assert two["opened_users_per_second"] == pytest.approx(1 / slower)
    assert len(two["worker_busy"]) == 3 and min(two["worker_busy"]) > 0
    webdataset_rate = lines["webdataset"]["users_per_second"]
    ratios = record["ratios"]
    assert ratios["ready, workers: 2 / webdataset"] == pytest.approx(
        two["users_per_second"] / webdataset_rate
    )
    seconds = (
        opening["seconds"]["median"] + lines["decode"]["seconds"]["median"]
    )
    assert ratios["open and decode / webdataset"] == pytest.approx(
        40 / seconds / webdataset_rate
    )
    raw = lines["raw from cache"]["bytes_per_second"]
    assert ratios["open and decode / raw from cache"] == pytest.approx(
        opening["bytes"] / seconds / raw
    )
    assert (
        record["dataset"]["users"] == 40
        and record["machine"]["versions"]["webdataset"]
    )
    shown = capsys.readouterr().out
    assert "40 users, " in shown
    assert all(name in shown for name in [*NAMES, *ratios])


@pytest.mark.ranks
def test_short_makes_a_dataset_of_its_own(monkeypatch, tmp_path, capsys):
    run_main(
        monkeypatch,
        "--short",
        "users=300",
        "workers=[1]",
        "repeats=1",
        f"folder={tmp_path}",
    )
    assert list(tmp_path.iterdir()) == []
    assert "300 users, " in capsys.readouterr().out


def test_parts_are_of_whole_rounds_and_their_sum(data, histories):
    one = setting(data)
    found = stream.parts(one)
    whole = sum(found[name].seconds for name in ("assign", "read", "build"))
    assert found["all in one process"].seconds == pytest.approx(whole)
    batches = one.fed()
    users = [
        batches.plan.users(*batches.plan.locate(position), 0)
        for position in range(2, 6)
    ]
    assert found["read"].users == sum(map(len, users))
    assert found["read"].tokens == tokens(
        [histories[user] for user in np.concatenate(users)], 5
    )


def test_the_webdataset_holds_the_same_histories(tmp_path, data, histories):
    one = setting(data)
    tars = stream.write_webdataset(one, tmp_path)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    numbers = [int(sample["__key__"]) for sample in samples]
    assert len(set(numbers)) == 9
    for number, sample in zip(numbers, samples, strict=True):
        assert sample["items.npy"].tolist() == histories[number]
        assert sample["domains.npy"].tolist() == [
            int(row >= 8) for row in histories[number]
        ]
    timed = stream.read_webdataset(one, tars)
    assert (timed.users, timed.tokens) == (
        9,
        tokens([histories[number] for number in numbers], 5),
    )


def test_samples_go_on_in_a_next_tar(tmp_path, data, monkeypatch):
    monkeypatch.setattr(stream, "_SAMPLES", 15)
    tars = stream.write_webdataset(setting(data, samples=1000), tmp_path)
    assert len(tars) == 3
    assert stream.read_webdataset(setting(data), tars).users == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give data="),
        (["--short", "repeats=0"], "repeats is 0: give at least 1"),
        (
            ["--short", "folder=/nowhere/at"],
            "folder /nowhere/at: there is no such folder",
        ),
    ],
)
def test_bad_options_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("stream", stream.Settings, arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.ranks
def test_a_folder_that_is_no_dataset_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run_main(
            monkeypatch, "--short", f"data={tmp_path}", f"folder={tmp_path}"
        )
    assert left.value.code == 2
    assert f"{tmp_path} is not a dataset folder" in capsys.readouterr().err
