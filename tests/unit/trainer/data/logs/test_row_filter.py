"""A row filter says at which character it is wrong, and can name nothing but columns and values."""

import duckdb
import pytest

from trainer.data.logs.duckdb_groups import DuckDBDialect
from trainer.data.logs.row_filter import (
    filter_sql,
    parse_row_filter,
)
from trainer.errors import InputError

ROWS = [
    # rating, event, score, done, day
    ("4", "buy", 4.5, True, "2024-01-01"),
    ("10", "view", float("nan"), False, "2024-02-01"),
    ("", "it's", None, None, None),
    ("four", "", 1.0, True, "2024-03-01 12:00:00"),
]
KINDS = {
    "rating": "text",
    "event": "text",
    "score": "float",
    "done": "boolean",
    "day": "date",
}


def kept(text):
    """The numbers of the rows that a filter keeps."""
    row_filter = parse_row_filter(text)

    def find(column):
        if column.name not in KINDS:
            row_filter.refuse(column.position, "no such column")
        return f'"{column.name}"', KINDS[column.name]

    condition = filter_sql(row_filter, DuckDBDialect(), find)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("""
            CREATE TABLE rows (
                rating VARCHAR, event VARCHAR, score DOUBLE, done BOOLEAN, day TIMESTAMP
            )""")
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", ROWS)
        found = connection.execute(
            f"SELECT rowid FROM rows WHERE {condition} ORDER BY rowid"
        ).fetchall()
    return [number for (number,) in found]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("rating >= 4", [0, 1]),  # as numbers, though they are texts
        ("4 < rating", [1]),
        ("rating = '4'", [0]),
        ("not rating >= 4", []),  # of a missing value nothing is known
        ("rating is null", [2]),
        ("rating is not null and event is not null", [0, 1]),
        ("score >= 1", [0, 3]),  # a NaN is missing
        ("score is null", [1, 2]),
        ("event in ('buy', 'it''s')", [0, 2]),
        ("event not in ('buy', 'view')", [2]),
        ("event like 'b%' or event like '_iew'", [0, 1]),
        ("rating between 5 and 1e1", [1]),
        ("done = true", [0, 3]),
        ("done != TRUE", [1]),
        ("day >= '2024-02-01'", [1, 3]),
        ("day < '2024-03-01T12:00:00Z'", [0, 1]),
        ("(\"rating\" >= 4 or `event` = 'x') AND NOT (score > 4)", []),
        ("rating == 4 or (rating <> 4)", [0, 1]),
    ],
)
def test_the_rows_that_a_filter_keeps(text, rows):
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 1, "expected a column, and it ends here"),
        ("rating >=", 10, "expected a value, and it ends here"),
        ("rating >> 4", 9, "expected a value, not >"),
        ("rating = four", 10, "a text stands in single quotes"),
        ("rating = 4 5", 12, "expected and, or, or the end, not 5"),
        ("rating = 'x", 10, "the ' is not closed"),
        ("(rating = 4", 12, r"expected \)"),
        ("rating in ()", 12, "expected a value"),
        ("rating not = 4", 12, "expected in, like or between"),
        ("rating is 4", 11, "expected null"),
        ("rating between 4", 17, "expected and"),
        ("event like 4", 12, "like needs a text"),
        ("rating = 4; drop", 11, "';' is not understood"),
        ("read_csv('/etc/passwd') = 1", 9, "expected a comparison"),
        ("rating = (select 1)", 10, "expected a value"),
        ("'a' = 'a'", 7, "expected a column"),
        ("rating + 1 = 2", 8, r"'\+' is not understood"),
        ("rating = 12345678901234567890", 10, "too many digits"),
        ("rating = 1e999", 10, "too large"),
        ("(" * 200 + "rating = 4" + ")" * 200, 101, "too many brackets"),
        ("strange = 4", 1, "no such column"),
        ("day = 4", 1, "'day' has dates, not numbers"),
        ("day = 'monday'", 7, "'monday' is no date"),
        ("score = '1.0'", 1, "without quotes"),
        ("done > true", 8, "compare with = and != alone"),
    ],
)
def test_a_filter_that_cannot_be_is_refused_at_its_character(
    text, position, reason
):
    with pytest.raises(InputError, match=reason) as error:
        kept(text)
    assert f": character {position}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_reaches_the_engine_as_a_text():
    assert kept("event = '''; DROP TABLE rows; --'") == []
    assert kept("event = 'it''s'") == [2]
