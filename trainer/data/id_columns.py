"""How ids are read from a column of any type: as whole numbers, or as text.

The type that a file gives a column is an accident. pandas makes floats of whole numbers beside a
missing one, a database writes DECIMAL(20, 0), an old Spark writes text as bytes. An id is the
same in all of them:

    column              values           ids
    BIGINT, TINYINT …   56               56
    DOUBLE              56.0             56
    DOUBLE              56.5             refused
    DECIMAL(9, 2)       56.00            56
    CSV                 12.0, 7          12, 7    where all of the column are whole numbers
    CSV                 12.0, x          '12.0', 'x'
    VARCHAR             '56', '007'      '56', '007'
    BLOB                b'caf\\xc3\\xa9'   'café'   refused where it is no UTF-8
    UUID, DATE, BOOL    …                their text

Everything here is SQL of DuckDB. `spark_logs.py` has the same rules in Spark's.
"""

import re
from dataclasses import dataclass

# The largest whole number up to which a float tells every one from the next.
_LARGEST_EXACT = {"DOUBLE": 2**53, "FLOAT": 2**24}
WHOLE_TYPES = {
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
}
# Whole numbers that may not fit int64: their values decide.
WIDE_TYPES = {"UBIGINT", "HUGEINT", "UHUGEINT"}
_DECIMAL = re.compile(r"DECIMAL\(\d+,\s*(\d+)\)")


@dataclass(frozen=True)
class IdColumn:
    """SQL for the ids of one column.

    value: SQL of its value. type: its DuckDB type. is_parsed: its values are text that says no
    type, as in CSV: what is written like a whole number is one.
    """

    value: str
    type: str
    is_parsed: bool = False

    def whole_sql(self) -> str:
        """Returns SQL for: the id is a whole number that fits int64.

        '007' and '1e3' are text. A float is one unless it is at fault.
        """
        if self.type in WHOLE_TYPES or self.type in _LARGEST_EXACT:
            return "true"
        if self.is_parsed:
            digits = self._digits_sql()
            number = f"TRY_CAST({digits} AS BIGINT)::VARCHAR"
            return f"coalesce({number} = {digits}, false)"
        if self.type in WIDE_TYPES or self._is_decimal():
            return f"(TRY_CAST({self.value} AS BIGINT) IS NOT NULL)"
        return "false"

    def fault_sql(self) -> str:
        """Returns SQL for: the value is no id, see `fault_reason`. Never true for a missing one.

        Fractions are none, nor are floats that do not tell a whole number from the next.
        """
        value = self.value
        if self.type in _LARGEST_EXACT:
            largest = _LARGEST_EXACT[self.type]
            return f"({value} <> trunc({value}) OR abs({value}) > {largest})"
        if self._is_decimal():
            return f"({value} <> trunc({value}))"
        if self.type == "BLOB":
            return f"({value} IS NOT NULL AND {self._decoded_sql()} IS NULL)"
        return "false"

    def id_sql(self, is_whole: bool, id_type: str = "VARCHAR") -> str:
        """Returns SQL for the id, as BIGINT or VARCHAR.

        is_whole: all ids of the column are whole numbers.
        """
        value = self.value
        if is_whole:
            if self.is_parsed:
                value = self._digits_sql()
            value = f"{value}::BIGINT"
        elif self.type == "BLOB":
            value = self._decoded_sql()
        elif self._is_decimal():
            value = f"trunc({value})::HUGEINT"
        return f"{value}::{id_type}"

    def text_sql(self) -> str:
        """Returns SQL for the id's text, whatever the other values are.

        A value that is no id keeps its own text, by which it can be named.
        """
        value = self.value
        text = f"{value}::VARCHAR"
        number = ""
        if self.type in _LARGEST_EXACT:
            number = f"TRY_CAST({value} AS BIGINT)::VARCHAR"
        elif self._is_decimal():
            number = f"trunc({value})::HUGEINT::VARCHAR"
        elif self.type == "BLOB":
            return f"coalesce({self._decoded_sql()}, {text})"
        if number:
            return f"CASE WHEN {self.fault_sql()} THEN {text} ELSE {number} END"
        return text

    def _digits_sql(self) -> str:
        """Returns SQL for parsed text without the .0 of a float."""
        return f"regexp_replace({self.value}, '[.]0+$', '')"

    def _decoded_sql(self) -> str:
        """Returns SQL for the text of bytes; NULL where they are no UTF-8."""
        return f"TRY(decode({self.value}))"

    def _is_decimal(self) -> bool:
        return _DECIMAL.fullmatch(self.type) is not None


def fault_reason(column_type: str) -> str:
    """Says why a value is no id, and the way out."""
    if column_type.upper() in ("BLOB", "BINARY"):
        return "bytes that are no UTF-8 text: write the column as text"
    return (
        "an id is a whole number or a text, and a float tells whole numbers apart "
        "up to 2^53 alone (float32: 2^24): write the column as whole numbers or as text"
    )
