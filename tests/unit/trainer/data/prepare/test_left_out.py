"""What a preparation leaves out is counted and named; a killed one goes on."""

import json
import random

import pytest

from tests.helpers.log_forms import bad_csv, sample_events, write_csv
from tests.unit.trainer.data.prepare.test_pipeline import (
    digests,
    run,
    some_rows,
    write,
)
from trainer import prepare
from trainer.config.prepare import PrepareConfig
from trainer.errors import InputError
from trainer.files.staged import StagedOutput
from trainer.reporting.command_tables import dataset_notes


def names(dataset):
    return [domain.name for domain in dataset.domains]


def test_small_domains_are_left_out_by_name(tmp_path):
    """A long tail of domains: of one item, of few interactions."""
    rows = some_rows()
    rows += [(user, 1, "War", 5) for user in range(23)]  # one item
    rows += [(user, 1, "War", 6) for user in range(23)]
    rows += [(1, item, "Noir", 7) for item in range(5)]
    log = write(tmp_path / "log.csv", rows)
    with pytest.raises(InputError, match=r"'War' has one item.*--min-domain"):
        run(tmp_path / "out", log)
    dataset = run(tmp_path / "out", log, min_domain=6)
    assert names(dataset) == ["navi", "shop", "video"]
    plain = run(tmp_path / "plain", write(tmp_path / "p.csv", some_rows()))
    files = digests(dataset.folder)
    record = json.loads((dataset.folder / "preparation.json").read_text())
    assert record["domains"] == {
        "Noir": {"items": 5, "interactions": 5},
        "War": {"items": 1, "interactions": 46},
    }
    del files["preparation.json"]
    assert files == digests(plain.folder)
    assert "Noir (5 items, 5 interactions), War" in dataset_notes(dataset)[0]
    kept = run(tmp_path / "kept", log, min_domain=5)
    assert names(kept) == ["Noir", "navi", "shop", "video"]


def core(rows, min_user, min_item, min_domain):
    """The rows that are left, by counting in plain Python."""
    while True:
        users, items, domains, kinds = {}, {}, {}, {}
        for user, item, domain, _ in rows:
            users[user] = users.get(user, 0) + 1
            items[domain, item] = items.get((domain, item), 0) + 1
            domains[domain] = domains.get(domain, 0) + 1
            kinds.setdefault(domain, set()).add(item)
        kept = [
            row
            for row in rows
            if users[row[0]] >= min_user
            and items[row[2], row[1]] >= min_item
            and domains[row[2]] >= min_domain
            and len(kinds[row[2]]) > 1
        ]
        if len(kept) == len(rows):
            return rows
        rows = kept


@pytest.mark.parametrize("least", [(0, 0, 40), (4, 0, 40), (4, 3, 30)])
def test_users_items_and_domains_are_dropped_until_none_is_left_to_drop(
    tmp_path, least
):
    draw = random.Random(7)
    rows = []
    for number in range(300):
        domain = min(int(draw.expovariate(0.6)), 8)
        rows.append(
            (draw.randrange(50), draw.randrange(12), f"d{domain}", number)
        )
    min_user, min_item, min_domain = least
    left = core(rows, *least)
    assert 0 < len(left) < len(rows)
    options = {
        "min_user": min_user,
        "min_item": min_item,
        "min_domain": min_domain,
    }
    dataset = run(
        tmp_path / "out", write(tmp_path / "log.csv", rows), **options
    )
    assert dataset.interactions == len(left)
    assert names(dataset) == sorted({domain for _, _, domain, _ in left})


def test_domains_of_an_extended_dataset_stay(tmp_path):
    rows = some_rows()
    old = run(
        tmp_path / "old",
        write(
            tmp_path / "old.csv",
            rows + [(1, item, "tiny", item) for item in (1, 2)],
        ),
        keep_log=True,
    )
    new = [(2, item, "new", 100 + item) for item in (1, 2)]
    dataset = run(
        tmp_path / "new",
        write(tmp_path / "new.csv", new + rows),
        extend=str(old.folder),
        min_domain=50,
        streams=old.streams,
    )
    assert names(dataset) == ["navi", "shop", "tiny", "video"]


def test_bad_rows_stay_left_out_where_the_log_is_kept(tmp_path):
    log = bad_csv(tmp_path)
    plain = run(tmp_path / "plain", log, bad_rows="skip")
    kept = run(tmp_path / "kept", log, bad_rows="skip", keep_log=True)
    for name in ("preparation.json", "bad_rows.jsonl"):
        one = (plain.folder / name).read_text()
        assert one == (kept.folder / name).read_text()
    assert kept.interactions == plain.interactions


def test_killed_on_the_threshold_the_same_command_delivers(
    tmp_path, monkeypatch
):
    """The dataset is whole in the work folder, and not yet in its place."""
    log = write_csv(tmp_path, sample_events())

    def die(work, stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagedOutput, "deliver", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", log)
    assert (tmp_path / ".out.work/dataset/dataset.json").is_file()
    dataset = run(tmp_path / "out", log)
    assert dataset.folder == tmp_path / "out"
    assert digests(dataset.folder) == digests(run(tmp_path / "b", log).folder)
    assert not (tmp_path / ".out.work").exists()


def test_its_own_work_is_no_log(tmp_path, monkeypatch):
    """--input . --output data, killed, and the same again; then a second dataset beside."""
    monkeypatch.chdir(tmp_path)
    log = write_csv(tmp_path, sample_events())

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.prepare.pipeline._make_part", die)
        with pytest.raises(KeyboardInterrupt):
            run("data", ".", processes=1)
    assert (tmp_path / ".data.work/ids").is_dir()
    run("data", ".", processes=1)
    second = run("second", ".", processes=1)
    assert digests(second.folder) == digests(run("third", log).folder)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"since": ""}, "since is empty"),
        ({"extend": ""}, "extend is empty"),
        ({"items": ""}, "items is empty"),
        ({"time_format": ""}, "time_format is empty"),
        ({"delimiter": ""}, "delimiter is ''"),
        ({"delimiter": '"'}, "delimiter is"),
        ({"delimiter": "12345"}, "delimiter is"),
        ({"columns": "a,,b"}, "columns is a,,b"),
        ({"columns": ["a", "a"]}, "columns is a,a"),
        ({"items_delimiter": ";"}, "give --items"),
        ({"bad_rows": "ignore"}, "give 'stop' or 'skip'"),
        ({"min_domain": -1}, "min_domain is -1"),
        (
            {"domain": "x", "domain_column": "genre"},
            "domain is 'x' and domain_column is 'genre'",
        ),
        ({"domain": "x", "items": "i.csv"}, "domain is 'x' and items is"),
    ],
)
def test_options_that_contradict_or_say_nothing_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        PrepareConfig(("logs",), "out", **options)


def test_python_takes_the_same_options(tmp_path):
    events = sample_events()
    log = tmp_path / "log.txt"
    lines = []
    for event in events:
        lines.append(
            f"{event['user_id']};{event['item_id']};{event['rating']};{event['timestamp']}"
        )
    log.write_text("\n".join(lines))
    dataset = prepare(
        log,
        tmp_path / "out",
        columns=["user_id", "item_id", "rating", "timestamp"],
        delimiter=";",
        domain="shop",
        where="rating in (4, 5)",
    )
    assert dataset.interactions == sum(event["rating"] > 3 for event in events)


@pytest.mark.parametrize(
    ("users", "streams"), [(3, 3), (100, 8), (671, 41), (1100, 64)]
)
def test_few_users_are_in_few_shards(tmp_path, users, streams):
    rows = [(user, user % 5, "a", 1) for user in range(users)]
    dataset = run(tmp_path / "out", write(tmp_path / "log.csv", rows))
    assert (dataset.streams, len(dataset.shards)) == (streams, streams)
