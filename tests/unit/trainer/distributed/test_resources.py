import os

import pytest

from trainer.distributed.resources import count_cores_per_rank


@pytest.mark.parametrize(
    ("given", "ranks", "cores"),
    [
        ({}, 4, 4),
        ({"LOCAL_WORLD_SIZE": "2"}, 16, 8),
        ({"LOCAL_SIZE": "99"}, 99, 1),
    ],
)
def test_ranks_of_a_machine_share_its_cores(monkeypatch, given, ranks, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert count_cores_per_rank(ranks) == cores
