"""Which rows of a log count: `--where "rating >= 4 and event in ('buy', 'cart')"`.

The expression is parsed here, and each engine gets SQL that is made of the parsed parts. So it
can name columns and values, and call nothing.

    expression   comparisons, joined by and, or, not and brackets
    comparison   COLUMN = VALUE (or == != <> < <= > >=), COLUMN in (VALUE, …),
                 COLUMN between VALUE and VALUE, COLUMN like 'a%', COLUMN is null
    COLUMN       a name; in double quotes or backquotes where it has other letters
    VALUE        a number, a 'text', true or false

A number compares as a number, also with the text of a CSV; a text that is none, an empty text and
a NaN are missing. As in SQL, no comparison with a missing value holds. A quoted value compares as
text, or as a date where the column has dates.
"""

import datetime
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

from trainer.errors import InputError

Kind = Literal["text", "whole", "float", "decimal", "boolean", "date", "other"]

# What both engines read alike as a number.
NUMBER = r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?"
_TOKENS = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
        |(?P<text>'(?:[^']|'')*')
        |(?P<quoted>"(?:[^"]|"")+"|`(?:[^`]|``)+`)
        |(?P<name>[^\W\d][\w.]*)
        |(?P<sign><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
_COMPARISONS = {
    "=": "=",
    "==": "=",
    "!=": "<>",
    "<>": "<>",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_WORDS = {
    "and",
    "or",
    "not",
    "in",
    "like",
    "is",
    "null",
    "between",
    "true",
    "false",
}
_TRUE = ("true", "t", "yes", "y", "1")
_FALSE = ("false", "f", "no", "n", "0")
_MOST_DEPTH = 100  # brackets in brackets
_EXACT = 2**53  # up to here a double holds each whole number


@dataclass(frozen=True)
class Value:
    """A number, text or truth value of an expression, and where it stands, from 1."""

    kind: Literal["number", "text", "boolean"]
    text: str
    position: int


@dataclass(frozen=True)
class Column:
    """A column of an expression, and where it stands, from 1."""

    name: str
    position: int


@dataclass(frozen=True)
class Comparison:
    """A column compared with values.

        rating >= 4             Comparison(rating, ">=", (4,))
        4 <= rating             the same
        event in ('buy', 'x')   Comparison(event, "in", ("buy", "x"))
        event is null           Comparison(event, "null", ())

    operator: = <> < <= > >= in between like or null.
    """

    column: Column
    operator: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Connection:
    """Conditions joined by and, or; not has one.

    rating >= 4 and not (event = 'view' or event = 'hide')

    and
    ├── rating >= 4
    └── not
        └── or
            ├── event = 'view'
            └── event = 'hide'
    """

    word: str
    parts: "tuple[Condition, ...]"


Condition = Comparison | Connection


@dataclass(frozen=True)
class RowFilter:
    """A parsed expression."""

    text: str
    condition: Condition

    @property
    def columns(self) -> list[Column]:
        """The columns that it names, each where it stands first."""
        columns: dict[str, Column] = {}
        for column in _columns_of(self.condition):
            columns.setdefault(column.name, column)
        return list(columns.values())

    def refuse(self, position: int, reason: str) -> NoReturn:
        """Raises InputError about the expression at a position, from 1."""
        refuse(self.text, position, reason)


class Dialect(Protocol):
    """The SQL of an engine."""

    def quote_text(self, text: str) -> str:
        """Returns the literal of a text."""

    def as_text(self, value: str) -> str:
        """Returns SQL of the value as text."""

    def as_number(self, value: str, kind: Kind) -> str:
        """Returns SQL of the value as a finite double, NULL for what is none."""

    def as_microseconds(self, value: str) -> str:
        """Returns SQL of a date in microseconds since 1970."""


def refuse(text: str, position: int, reason: str) -> NoReturn:
    """Raises InputError about an expression at a position, from 1."""
    raise InputError(f"where {text!r}: character {position}: {reason}")


def parse_row_filter(text: str) -> RowFilter:
    """Parses an expression. Raises InputError that says at which character it is wrong."""
    parser = _Parser(text)
    condition = parser.parse_or()
    parser.expect_end()
    return RowFilter(text, condition)


def filter_sql(
    row_filter: RowFilter,
    dialect: Dialect,
    find: Callable[[Column], tuple[str, Kind]],
) -> str:
    """Returns SQL for: the row counts, true or false.

    find: the SQL and the kind of a column; raises InputError where there is none.
    """
    condition = _Renderer(row_filter, dialect, find).render(
        row_filter.condition
    )
    return f"coalesce({condition}, false)"


def _columns_of(condition: Condition) -> Iterable[Column]:
    if isinstance(condition, Comparison):
        yield condition.column
        return
    for part in condition.parts:
        yield from _columns_of(part)


class _Token:
    """A word of the text: its kind, what it says and where it stands, from 1."""

    def __init__(self, kind: str, text: str, position: int):
        self.kind = kind
        self.text = text
        self.position = position

    @property
    def word(self) -> str:
        """The word in small letters where it is one of the language's, else empty."""
        if self.kind != "name":
            return ""
        lower = self.text.lower()
        return lower if lower in _WORDS else ""


class _Parser:
    """Reads an expression from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = _split(text)
        self.next = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def parse_or(self) -> Condition:
        """Parses conditions joined by or."""
        return self._parse_joined("or", self._parse_and)

    def _parse_and(self) -> Condition:
        return self._parse_joined("and", self._parse_not)

    def _parse_joined(
        self, word: str, parse_part: Callable[[], Condition]
    ) -> Condition:
        parts = [parse_part()]
        while self.token.word == word:
            self.next += 1
            parts.append(parse_part())
        if len(parts) == 1:
            return parts[0]
        return Connection(word, tuple(parts))

    def _parse_not(self) -> Condition:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            self._refuse("there are too many brackets in brackets")
        try:
            if self.token.word == "not":
                self.next += 1
                return Connection("not", (self._parse_not(),))
            if self.token.text == "(" and self.token.kind == "sign":
                self.next += 1
                condition = self.parse_or()
                self._expect_sign(")")
                return condition
            return self._parse_comparison()
        finally:
            self.depth -= 1

    def _parse_comparison(self) -> Condition:
        if self._is_value():
            value = self._parse_value()
            operator = self._parse_operator()
            column = self._parse_column()
            operator = _MIRRORED.get(operator, operator)
            return Comparison(column, operator, (value,))
        column = self._parse_column()
        if self.token.word == "is":
            return self._parse_null(column)
        is_negated = self.token.word == "not"
        if is_negated:
            self.next += 1
        comparison = self._parse_rest(column, is_negated)
        if is_negated:
            return Connection("not", (comparison,))
        return comparison

    def _parse_rest(self, column: Column, is_negated: bool) -> Comparison:
        """Parses what stands behind a column."""
        word = self.token.word
        if word == "in":
            self.next += 1
            return Comparison(column, "in", self._parse_list())
        if word == "like":
            self.next += 1
            value = self._parse_value()
            if value.kind != "text":
                refuse(self.text, value.position, "like needs a text, as 'a%'")
            return Comparison(column, "like", (value,))
        if word == "between":
            self.next += 1
            low = self._parse_value()
            if self.token.word != "and":
                self._refuse("expected and")
            self.next += 1
            return Comparison(column, "between", (low, self._parse_value()))
        if is_negated:
            self._refuse("expected in, like or between")
        return Comparison(
            column, self._parse_operator(), (self._parse_value(),)
        )

    def _parse_null(self, column: Column) -> Condition:
        self.next += 1
        is_negated = self.token.word == "not"
        if is_negated:
            self.next += 1
        if self.token.word != "null":
            self._refuse("expected null")
        self.next += 1
        comparison = Comparison(column, "null", ())
        if is_negated:
            return Connection("not", (comparison,))
        return comparison

    def _parse_list(self) -> tuple[Value, ...]:
        self._expect_sign("(")
        values = [self._parse_value()]
        while self.token.text == "," and self.token.kind == "sign":
            self.next += 1
            values.append(self._parse_value())
        self._expect_sign(")")
        return tuple(values)

    def _parse_operator(self) -> str:
        token = self.token
        if token.kind != "sign" or token.text not in _COMPARISONS:
            self._refuse("expected a comparison such as =")
        self.next += 1
        return _COMPARISONS[token.text]

    def _parse_column(self) -> Column:
        token = self.token
        if token.kind == "quoted":
            quote = token.text[0]
            name = token.text[1:-1].replace(quote * 2, quote)
        elif token.kind == "name" and not token.word:
            name = token.text
        else:
            self._refuse("expected a column")
        self.next += 1
        return Column(name, token.position)

    def _is_value(self) -> bool:
        token = self.token
        return token.kind in ("number", "text") or token.word in (
            "true",
            "false",
        )

    def _parse_value(self) -> Value:
        token = self.token
        if not self._is_value():
            hint = ""
            if token.kind in ("name", "quoted"):
                hint = "; a text stands in single quotes"
            self._refuse("expected a value", hint)
        self.next += 1
        if token.kind == "text":
            text = token.text[1:-1].replace("''", "'")
            return Value("text", text, token.position)
        if token.word:
            return Value("boolean", token.word, token.position)
        if not abs(float(token.text)) < float("inf"):
            refuse(self.text, token.position, "the number is too large")
        is_whole = token.text.lstrip("+-").isdecimal()
        if is_whole and abs(int(token.text)) > _EXACT:
            refuse(
                self.text,
                token.position,
                "the number has too many digits: write it as a text, in single quotes",
            )
        return Value("number", token.text, token.position)

    def _expect_sign(self, sign: str) -> None:
        if self.token.text != sign or self.token.kind != "sign":
            self._refuse(f"expected {sign}")
        self.next += 1

    def expect_end(self) -> None:
        """Raises InputError where something is left."""
        if self.token.kind != "end":
            self._refuse("expected and, or, or the end")

    def _refuse(self, expected: str, hint: str = "") -> NoReturn:
        token = self.token
        there = f"not {token.text}"
        if token.kind == "end":
            there = "and it ends here"
        refuse(self.text, token.position, f"{expected}, {there}{hint}")


def _split(text: str) -> list[_Token]:
    """Splits an expression into tokens, and one for its end."""
    tokens = []
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKENS.match(text, position)
        if match is None:
            rest = text[position:]
            start = position + len(rest) - len(rest.lstrip())
            reason = f"{text[start]!r} is not understood"
            if text[start] in "'\"`":
                reason = f"the {text[start]} is not closed"
            refuse(text, start + 1, reason)
        kind = str(match.lastgroup)
        start = match.start(kind)
        tokens.append(_Token(kind, match[kind], start + 1))
        position = match.end()
    tokens.append(_Token("end", "", end + 1))
    return tokens


class _Renderer:
    """Makes an engine's SQL of a condition."""

    def __init__(
        self,
        row_filter: RowFilter,
        dialect: Dialect,
        find: Callable[[Column], tuple[str, Kind]],
    ):
        self.row_filter = row_filter
        self.dialect = dialect
        self.find = find

    def render(self, condition: Condition) -> str:
        """Returns SQL of a condition, in brackets."""
        if isinstance(condition, Comparison):
            return f"({self._comparison(condition)})"
        parts = [self.render(part) for part in condition.parts]
        if condition.word == "not":
            return f"(NOT {parts[0]})"
        return "(" + f" {condition.word} ".join(parts) + ")"

    def _comparison(self, comparison: Comparison) -> str:
        value, kind = self.find(comparison.column)
        if kind == "other":
            self._refuse_kind(comparison.column, "no single values")
        operator = comparison.operator
        if operator == "null":
            return f"{self._or_null(value, kind)} IS NULL"
        if operator == "like":
            text = self.dialect.as_text(value)
            pattern = self.dialect.quote_text(comparison.values[0].text)
            # No letter escapes: % and _ stand for others everywhere.
            escape = self.dialect.quote_text("\x01")
            return f"{text} LIKE {pattern} ESCAPE {escape}"
        if operator == "in":
            options = []
            for one in comparison.values:
                options.append(self._compare(comparison, value, kind, "=", one))
            return " OR ".join(options)
        if operator == "between":
            low, high = comparison.values
            return (
                self._compare(comparison, value, kind, ">=", low)
                + " AND "
                + self._compare(comparison, value, kind, "<=", high)
            )
        (one,) = comparison.values
        return self._compare(comparison, value, kind, operator, one)

    def _or_null(self, value: str, kind: Kind) -> str:
        """Returns SQL of the value, NULL where it is missing."""
        if kind == "text":
            return f"nullif({value}, '')"
        if kind == "float":
            return self.dialect.as_number(value, kind)
        return value

    def _compare(
        self,
        comparison: Comparison,
        value: str,
        kind: Kind,
        operator: str,
        literal: Value,
    ) -> str:
        """Returns SQL of one comparison with one value."""
        dialect = self.dialect
        column = comparison.column
        if literal.kind == "number":
            if kind in ("date", "boolean"):
                self._refuse_kind(column, f"{kind}s, not numbers")
            number = dialect.as_number(value, kind)
            return f"{number} {operator} CAST('{literal.text}' AS DOUBLE)"
        if literal.kind == "boolean":
            return self._compare_boolean(column, value, kind, operator, literal)
        if kind == "date":
            microseconds = dialect.as_microseconds(value)
            return f"{microseconds} {operator} {self._date(literal)}"
        if kind == "float":
            self._refuse_kind(
                column, "fractions: write the number without quotes"
            )
        text = f"nullif({dialect.as_text(value)}, '')"
        return f"{text} {operator} {dialect.quote_text(literal.text)}"

    def _compare_boolean(
        self,
        column: Column,
        value: str,
        kind: Kind,
        operator: str,
        literal: Value,
    ) -> str:
        if operator not in ("=", "<>"):
            self.row_filter.refuse(
                literal.position, "true and false compare with = and != alone"
            )
        if kind not in ("boolean", "text"):
            self._refuse_kind(column, "no truth values")
        text = f"lower({self.dialect.as_text(value)})"
        is_true = f"CASE WHEN {text} IN {_TRUE} THEN true WHEN {text} IN {_FALSE} THEN false END"
        return f"({is_true}) {operator} {literal.text}"

    def _date(self, literal: Value) -> int:
        """Returns a date in microseconds since 1970."""
        try:
            date = datetime.datetime.fromisoformat(literal.text)
        except ValueError:
            self.row_filter.refuse(
                literal.position,
                f"{literal.text!r} is no date such as 2024-01-31 or 2024-01-31 23:59:59",
            )
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        return (date - epoch) // datetime.timedelta(microseconds=1)

    def _refuse_kind(self, column: Column, has: str) -> NoReturn:
        self.row_filter.refuse(
            column.position, f"column {column.name!r} has {has}"
        )
