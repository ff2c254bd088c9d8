"""What is said of memory, page cache and processor holds."""

import mmap

import pytest
import torch

from benchmarks import machine


def test_the_cache_forgets_what_is_loaded_from_disk(tmp_path):
    if machine.file_system(tmp_path) not in ("ext4", "xfs"):
        pytest.skip("needs a file system whose page cache can be asked")
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10**6)
    file.chmod(0o444)
    assert machine.cached_bytes(file) >= 10**6
    assert machine.drop_from_cache([file]) is True
    assert machine.cached_bytes(file) == 0
    with open(file, "rb") as held:  # what someone has mapped stays
        mapped = torch.frombuffer(
            mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_COPY),
            dtype=torch.uint8,
        )
        assert int(mapped.sum()) == 10**6 * ord("x")
        assert machine.drop_from_cache([file]) is False


def test_memory_that_was_given_back_counts():
    before = machine.reset_peak_memory()
    if before is None:
        pytest.skip("the system does not tell the peak")
    torch.ones(10**8, dtype=torch.uint8)
    assert 0.9e8 < machine.peak_memory() - before < 1.5e8
    before = machine.reset_peak_memory()
    assert machine.peak_memory() - before < 0.5e8
