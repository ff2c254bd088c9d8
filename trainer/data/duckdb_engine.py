"""Joins beside a run: by DuckDB, within a part of the host's memory, whatever they join."""

import contextlib
import os
import tempfile

from embeddings.control_groups import host_memory
from trainer.data.prepare.shard_writing import connect, escape

_MOST, _LEAST, _SHARE = (
    8 * 10**9,
    256 * 10**6,
    0.25,
)  # bytes at most and at least; the share of what the host has free


@contextlib.contextmanager
def limited_engine():
    """A DuckDB connection. What does not fit into its memory goes to the system's folder for temporary files (TMPDIR)."""
    memory = max(_LEAST, min(_MOST, int(_SHARE * host_memory())))
    with (
        tempfile.TemporaryDirectory(prefix="join-") as scratch,
        connect() as connection,
    ):
        connection.execute(
            f"SET memory_limit = '{memory}B'; SET temp_directory = '{escape(scratch)}'"
        )
        connection.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
        yield connection
