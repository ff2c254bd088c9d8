"""Logs of every form become the same dataset; what cannot be read says why and what to do."""

import datetime
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.log_forms import (
    BAD_ROWS,
    DATED,
    FORMS,
    bad_csv,
    sample_events,
    write_csv,
    write_delimited,
)
from tests.unit.trainer.data.prepare.test_pipeline import digests, run
from trainer.errors import InputError


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The files of the dataset of the sample's CSV, by whether times are dates."""
    folder = tmp_path_factory.mktemp("wanted")
    events = sample_events()
    dataset = run(folder / "numbers", write_csv(folder, events))
    files = {False: digests(dataset.folder)}
    dated = []
    for event in events:
        date = datetime.datetime.fromtimestamp(event["timestamp"], datetime.UTC)
        dated.append({**event, "timestamp": date.isoformat()})
    dataset = run(folder / "dates", write_csv(folder, dated, "dated.csv"))
    files[True] = digests(dataset.folder)
    return files


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_dataset(tmp_path, form, wanted):
    given, options = FORMS[form](tmp_path, sample_events())
    dataset = run(tmp_path / "out", given, **options)
    assert digests(dataset.folder) == wanted[form in DATED]


@pytest.mark.parametrize("form", ["json lines", "MovieLens", "RecBole"])
def test_a_filter_holds_in_every_form(tmp_path, form):
    events = sample_events()
    kept = [event for event in events if event["rating"] >= 4]
    given, options = FORMS[form](tmp_path, events)
    dataset = run(tmp_path / "out", given, where="rating >= 4", **options)
    plain = run(tmp_path / "plain", write_csv(tmp_path, kept))
    files = digests(dataset.folder)
    record = json.loads((dataset.folder / "preparation.json").read_text())
    assert record["filtered"] == len(events) - len(kept)
    del files["preparation.json"]
    assert files == digests(plain.folder)


def test_bad_rows_are_counted_and_listed(tmp_path):
    log = bad_csv(tmp_path)
    dataset = run(tmp_path / "out", log, bad_rows="skip")
    assert dataset.interactions == 4
    lines = (dataset.folder / "bad_rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["row"]: row["reason"] for row in rows} == BAD_ROWS
    assert {row["file"] for row in rows} == {str(log)}
    record = json.loads((dataset.folder / "preparation.json").read_text())
    assert sum(record["bad"].values()) == len(BAD_ROWS)


def test_without_being_told_to_skip_the_first_bad_row_stops(tmp_path):
    with pytest.raises(InputError, match="Line: 4"):
        run(tmp_path / "out", bad_csv(tmp_path))


def test_a_log_without_a_bad_row_is_the_same_whether_they_are_skipped(tmp_path):
    log = write_csv(tmp_path, sample_events())
    one = run(tmp_path / "one", log)
    two = run(tmp_path / "two", log, bad_rows="skip")
    assert digests(one.folder) == digests(two.folder)


def test_lines_that_are_no_object_are_bad_rows(tmp_path):
    good = '{"user_id": 1, "item_id": %d, "domain": "a", "timestamp": 5}\n'
    text = good % 1 + '{"user_id": 1\n' + "\n" + good % 2 + "[1, 2]\n"
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(InputError, match=r"row 2: is no JSON object"):
        run(tmp_path / "out", log)
    dataset = run(tmp_path / "out", log, bad_rows="skip", where="user_id = 1")
    lines = (dataset.folder / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [2, 5]


def test_items_without_a_domain_are_named_and_counted(tmp_path):
    names = ["user_id", "item_id", "timestamp"]
    log = write_delimited(tmp_path / "log.csv", sample_events(), names)
    items = tmp_path / "items.csv"
    lines = [f"{item},{'ab'[item % 2]}" for item in range(23)]
    items.write_text("\n".join(["item_id,domain", *lines, "23,"]))
    events = sum(event["item_id"] == 23 for event in sample_events())
    with pytest.raises(InputError, match=rf"1 of .*, which have {events} rows"):
        run(tmp_path / "out", log, items=str(items))
    dataset = run(tmp_path / "out", log, items=str(items), bad_rows="skip")
    assert dataset.interactions == 400 - events
    (line,) = (dataset.folder / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["item"] == "23"
    assert json.loads(line)["rows"] == events


def test_an_item_of_two_domains_is_refused(tmp_path):
    names = ["user_id", "item_id", "timestamp"]
    log = write_delimited(tmp_path / "log.csv", sample_events(), names)
    items = tmp_path / "items.csv"
    items.write_text("item_id,domain\n1,a\n1,b\n")
    with pytest.raises(InputError, match="'1' has several domains, 'a' and"):
        run(tmp_path / "out", log, items=str(items))


CSV = "user_id,item_id,domain,timestamp\n"
LONG = "http://example.org/" + "x" * 400
UNREADABLE = {
    "another delimiter": (
        "a.csv",
        CSV.replace(",", ";") + "1;2;d;3\n",
        {},
        "give --delimiter ';'",
    ),
    "tabs in a CSV": (
        "a.csv",
        CSV.replace(",", "\t") + "1\t2\td\t3\n",
        {},
        "give --delimiter 'tab'",
    ),
    "colons": ("a.csv", "1::2::d::3\n", {}, "give --delimiter '::'"),
    "no header": ("a.csv", "1,2,d,3\n", {}, "name the columns with --columns"),
    "columns for a file with a header": (
        "a.csv",
        CSV + "1,2,d,3\n",
        {"columns": "user_id,item_id,domain,timestamp"},
        "its first line is a header",
    ),
    "columns that are too few": (
        "a.csv",
        "1,2,d,3\n",
        {"columns": "user_id,item_id,timestamp", "domain": "d"},
        "its first line has 4 fields, 3 columns are named",
    ),
    "why a long line is wrong": (
        "a.csv",
        CSV.strip() + f",referer\n1,2,d,3,{LONG}\n1,3,d,4,{LONG},more\n",
        {},
        "Expected Number of Columns: 5 Found: 6",
    ),
    "two kinds of line ends": (
        "a.csv",
        CSV + "1,2,d,3\n" * 9 + "1,3,d,4\r\n" * 9,
        {},
        "some line ends are CR LF and others LF",
    ),
    "dates that need a format": (
        "a.csv",
        CSV + "1,2,d,14/12/2009 02:52\n",
        {},
        "with --time-format",
    ),
    "dates of another format": (
        "a.csv",
        CSV + "1,2,d,14/12/2009 02:52\n",
        {"time_format": "%Y"},
        "a time must be a date like %Y",
    ),
    "a format that is none": (
        "a.csv",
        CSV + "1,2,d,3\n",
        {"time_format": "%Q"},
        "time_format '%Q' is none",
    ),
    "a filter of no column": (
        "a.csv",
        CSV + "1,2,d,3\n",
        {"where": "rating > 3"},
        "character 1: .*a.csv has no column 'rating'; it has user_id",
    ),
    "a filter that leaves nothing": (
        "a.csv",
        CSV + "1,2,d,3\n",
        {"where": "timestamp > 3"},
        "where leaves all 1 out",
    ),
    "JSON by columns": (
        "a.json",
        '{"user_id": {"0": 1}, "item_id": {"0": 1}, "domain": {"0": 1}, "timestamp": {"0": 1}}',
        {},
        "column 'user_id' holds STRUCT, not single values",
    ),
    "JSON without a key": (
        "a.jsonl",
        '{"uid": 1, "item_id": 2}\n',
        {},
        "has no column 'user_id'; it has uid, item_id",
    ),
}


@pytest.mark.parametrize(
    ("name", "text", "options", "named"),
    UNREADABLE.values(),
    ids=list(UNREADABLE),
)
def test_what_cannot_be_read_says_why_and_what_to_do(
    tmp_path, name, text, options, named
):
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(InputError, match=named) as error:
        run(tmp_path / "out", tmp_path / name, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    assert os.listdir(tmp_path) == [name]


def test_a_tsv_has_no_quotes(tmp_path):
    log = tmp_path / "log.tsv"
    rows = ['u1\t"Heroes\td\t1', "u1\tb\td\t2", 'u2\tLow"\td\t3']
    log.write_text(
        "\n".join(["user_id\titem_id\tdomain\ttimestamp", *rows]) + "\n"
    )
    dataset = run(tmp_path / "out", log)
    items = pq.read_table(dataset.folder / "vocabulary/0.parquet")["item_id"]
    assert sorted(items.to_pylist()) == ['"Heroes', 'Low"', "b"]


def test_columns_that_differ_in_case_alone_are_two(tmp_path):
    names = ["User_ID", "user_id", "item_id", "domain", "timestamp"]
    columns = [[9] * 4, [1, 2, 1, 2], [1, 1, 2, 2], ["d"] * 4, [1, 2, 3, 4]]
    log = tmp_path / "log.parquet"
    pq.write_table(
        pa.Table.from_arrays(list(map(pa.array, columns)), names), log
    )
    dataset = run(tmp_path / "out", log, where="User_ID = 9")
    users = pq.read_table(dataset.folder / "users.parquet")["user_id"]
    assert sorted(users.to_pylist()) == [1, 2]
    names = ["user_id", "user_id", "item_id", "domain", "timestamp"]
    pq.write_table(
        pa.Table.from_arrays(list(map(pa.array, columns)), names), log
    )
    with pytest.raises(InputError, match="more than one column 'user_id'"):
        run(tmp_path / "out2", log)


def test_a_files_own_column_counts_before_its_folders_name(tmp_path):
    folder = tmp_path / "domain=all"
    folder.mkdir()
    log = write_csv(folder, sample_events())
    dataset = run(tmp_path / "out", log)
    assert len(dataset.domains) == 3
