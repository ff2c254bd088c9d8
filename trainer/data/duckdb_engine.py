"""DuckDB as the project uses it: without extensions, and within a limit of memory.

`engine` keeps within an amount of memory that the caller names; `limited_engine` joins tables
beside a run, within a part of what the host has free. What does not fit goes to a scratch
folder.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
from duckdb import DuckDBPyConnection

from embeddings.control_groups import available_host_memory

if TYPE_CHECKING:
    from trainer.files.progress import Stages

# Of `engine`'s memory; DuckDB goes beyond its limit for a while, and NumPy needs some.
ENGINE_SHARE = 0.6
# Of `limited_engine`'s memory: the share of what the host has free, and its bounds in bytes.
_HOST_SHARE = 0.25
_LEAST_MEMORY = 256 * 10**6
_MOST_MEMORY = 8 * 10**9


def open_connection() -> DuckDBPyConnection:
    """Opens a DuckDB that fetches and loads no extension, whatever a file contains."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    return duckdb.connect(":memory:", config=settings)


def escape_sql(text: str | Path) -> str:
    """Escapes a text or path for an SQL literal between single quotes."""
    return str(text).replace("'", "''")


def parquet_folder_sql(folder: Path) -> str:
    """Returns SQL for the rows of all Parquet files in a folder, whatever its name."""
    pattern = escape_sql(glob.escape(str(folder)))
    return f"read_parquet('{pattern}/*.parquet', hive_partitioning=false)"


def parquet_sql(file: str | Path) -> str:
    """Returns SQL for the rows of one Parquet file, whatever it or a folder above it is called.

    A folder named domain=all would be a column otherwise, in place of the file's.
    """
    path = escape_sql(glob.escape(str(file)))
    return f"read_parquet('{path}', hive_partitioning=false)"


def query_value(connection: DuckDBPyConnection, query: str) -> Any:
    """Returns the one value of a query with one row and one column."""
    ((value,),) = connection.execute(query).fetchall()
    return value


def query_time_span(
    connection: DuckDBPyConnection, relation: str
) -> tuple[Any, Any]:
    """Returns the first and the last time of a table, view or `read_parquet(…)`; None without rows.

    Not by min() and max(): DuckDB 2.0 answers those from a file's statistics, and where a column of
    floats may hold NaN, its answer is NaN.
    """
    query = f"""
        SELECT min_by("time", "time"), max_by("time", "time")
        FROM {relation}"""
    (span,) = connection.execute(query).fetchall()
    first, last = span
    return first, last


def query_domain_spans(
    connection: DuckDBPyConnection, relation: str
) -> list[tuple[str, Any, Any]]:
    """Returns the first and the last time of each domain of a log, as `query_time_span` does."""
    query = f"""
        SELECT domain, min_by("time", "time"), max_by("time", "time")
        FROM {relation}
        GROUP BY domain
        ORDER BY domain"""
    return connection.execute(query).fetchall()


@contextlib.contextmanager
def open_engine(
    scratch: Path,
    memory: int,
    threads: int,
    stages: "Stages | None" = None,
) -> Iterator[DuckDBPyConnection]:
    """Opens a DuckDB that keeps within `memory` bytes, together with copies of its results.

    scratch: the folder for what does not fit. stages: show the progress of the queries.
    """
    memory_limit = int(memory * ENGINE_SHARE)
    with open_connection() as connection:
        connection.execute(f"""
            SET temp_directory = '{escape_sql(scratch)}';
            SET memory_limit = '{memory_limit}B';
            SET threads = {threads};
            SET preserve_insertion_order = false""")
        # Without ipywidgets DuckDB refuses this in a notebook; its stages have no percentage then.
        with contextlib.suppress(duckdb.InvalidInputException):
            connection.execute("""
                SET enable_progress_bar = true;
                SET enable_progress_bar_print = false""")
        if stages is not None:
            stages.connection = connection
        with _keep_interrupt():
            yield connection
        if stages is not None:
            stages.connection = None


@contextlib.contextmanager
def _keep_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt again, which DuckDB takes for an error of its own."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def open_limited_engine() -> Iterator[DuckDBPyConnection]:
    """Opens a DuckDB for joins beside a run, within a quarter of the host's free memory.

    What does not fit goes to the system's folder for temporary files (TMPDIR).
    """
    host_share = int(_HOST_SHARE * available_host_memory())
    memory = max(_LEAST_MEMORY, min(_MOST_MEMORY, host_share))
    threads = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="join-") as scratch,
        open_connection() as connection,
    ):
        connection.execute(f"""
            SET memory_limit = '{memory}B';
            SET temp_directory = '{escape_sql(scratch)}';
            SET threads = {threads}""")
        yield connection
