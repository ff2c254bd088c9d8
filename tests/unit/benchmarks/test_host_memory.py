"""What is reckoned adds up, and what is measured is near it."""

import json
import sys

import pytest

from benchmarks import host_memory, suite
from tests.helpers.alone import as_a_script, in_this_process

pytestmark = pytest.mark.ranks  # they start processes


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    file = tmp_path_factory.mktemp("host_memory") / "result.json"
    given = ["rows=[1000,200000000,250000000]", "ranks=[8]", "ranks_a_host=4"]
    given += ["device_bytes=80000000000", "host_bytes=500000000000"]
    with pytest.MonkeyPatch.context() as patch, as_a_script():
        patch.setattr(suite, "in_own_process", in_this_process)
        patch.setattr(
            sys,
            "argv",
            ["host_memory.py", "--short", "--json", str(file), *given],
        )
        host_memory.main()
    return json.loads(file.read_text())


def test_a_host_has_what_its_ranks_have_together(record):
    small, _, cached, on_cpu, refused, _ = record["plans"]
    assert (
        small["device_bytes"] == 1000 * 129 * 4
        and small["host_checkpoint"] == 4 * small["device_bytes"]
    )
    assert small["host_rows"] == 0 and small["copied"]
    for large in (cached, on_cpu):
        assert large["host_rows"] == 4 * 200_000_000 * 129 * 4
        assert not large["copied"] and large["host_checkpoint"] == 4 * 2**26
    assert "125.0 GB left for a rank" in refused["refused"]


def test_each_file_and_each_byte_is_read_once_where_as_many_ranks_read_as_wrote(
    record,
):
    small = record["reads"][0]
    assert small["table_bytes"] == 8 * 1000 * 129 * 4 == small["warm_bytes_now"]
    assert small["warm_bytes_before"] == 8 * small["table_bytes"]
    same, other = small["same"], small["other"]
    assert same == {
        "resume_before": 64,
        "resume_now": 8,
        "warm_before": 64,
        "warm_now": 16,
    }
    assert other["resume_before"] == 56 and other["resume_now"] == 14


def test_a_table_without_rows_takes_next_to_nothing(record):
    measured = record["measured"]
    assert (
        measured["made"]
        < measured["bytes"] / 2
        < measured["filled"]
        < measured["copied"]
    )
    assert "20,000" in host_memory.table(record)
