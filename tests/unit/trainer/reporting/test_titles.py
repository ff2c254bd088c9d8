"""Titles of items: read from tables of all kinds, kept for the items that a run names, refused in a line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.errors import InputError
from trainer.reporting.titles import add_titles, check_titles, read_titles

WANTED = {"films": {"7", "0"}, "books": {"7"}}
ROWS = [
    ("7", "films", "Alien, again"),
    ("7", "books", "Emma"),
    ("9", "films", "Jaws"),
]


def write(folder, name, rows=ROWS, columns=("item_id", "domain", "title")):
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(
            pa.table(
                list(map(list, zip(*rows, strict=True))), names=list(columns)
            ),
            file,
        )
    elif name.endswith(".jsonl"):
        lines = [
            json.dumps(dict(zip(columns, row, strict=True))) for row in rows
        ]
        file.write_text("\n".join(lines) + "\n")
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        quoted = [
            [f'"{cell}"' if mark in cell else cell for cell in row]
            for row in rows
        ]
        file.write_text(
            "\n".join(mark.join(row) for row in [columns, *quoted]) + "\n"
        )
    return file


@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl", "domain=all,[1]*.csv"]
)
def test_all_kinds_of_tables_say_the_same(tmp_path, name):
    titles = read_titles(write(tmp_path, name), WANTED)
    assert titles == {"films": {"7": "Alien, again"}, "books": {"7": "Emma"}}


@pytest.mark.parametrize("ids", [[7, 8], [7.0, None], ["7", "x"]])
def test_ids_of_any_type_are_the_dataset_s(tmp_path, ids):
    pq.write_table(
        pa.table({"item_id": ids, "title": ["Emma", "no"]}),
        tmp_path / "t.parquet",
    )
    titles = read_titles(tmp_path / "t.parquet", WANTED)
    assert titles == {"films": {"7": "Emma"}, "books": {"7": "Emma"}}


def test_a_semicolon_and_a_missing_title_are_read(tmp_path):
    (tmp_path / "t.csv").write_text("item_id;title\n7;Emma\n0;\n")
    assert read_titles(tmp_path / "t.csv", WANTED)["films"]["7"] == "Emma"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "t.csv",
            "id,name\n1,x\n",
            "has no column 'item_id'; it has id, name: titles need",
        ),
        (
            "t.csv",
            "item_id,name\n1,x\n",
            "has no column 'title'; it has item_id, name",
        ),
        ("t.xlsx", "x", "is no table of titles: the name must end in .parquet"),
        ("t.parquet", "x", "cannot be read: "),
    ],
)
def test_what_is_no_table_of_titles_is_refused_in_a_line(
    tmp_path, name, text, words
):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        check_titles(tmp_path / name)
    assert words in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"titles\.csv: there is no such file"):
        check_titles(tmp_path / "titles.csv")


def test_titles_are_kept_beside_the_items_that_they_name(tmp_path):
    file = write(tmp_path, "t.csv")
    with pytest.raises(
        InputError, match=r"look\.json: cannot be read: titles are for"
    ):
        check_titles(file, tmp_path)
    look = {
        "gates": {},
        "items": [
            {"domain": "films", "item": "9", "nearest": {"books": [["7", 0.5]]}}
        ],
    }
    (tmp_path / "look.json").write_text(json.dumps(look))
    check_titles(file, tmp_path)
    add_titles(tmp_path, file)
    kept = json.loads((tmp_path / "look.json").read_text())
    assert kept == look | {
        "titles": {"films": {"9": "Jaws"}, "books": {"7": "Emma"}}
    }
