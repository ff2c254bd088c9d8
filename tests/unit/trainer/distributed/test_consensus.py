"""Who is named where ranks differ, of any number of them; two real ones are in tests/ranks/test_meeting.py."""

import errno
import json
import os
import socket

import pytest

import trainer.distributed.consensus
from trainer.distributed.consensus import (
    require_same_on_all_ranks,
    run_on_all_ranks,
)
from trainer.errors import InputError
from trainer.files.atomic import LateStorage


@pytest.fixture
def compared(monkeypatch):
    """compared(facts of each rank): what is raised, as if there were so many ranks; None where nothing is."""

    def of(facts):
        digest = trainer.distributed.consensus._digest
        rows = [
            [digest(json.dumps(part, sort_keys=True)) for part in each.values()]
            for each in facts
        ]
        monkeypatch.setattr(
            trainer.distributed.consensus,
            "_gather_numbers",
            lambda numbers: rows,
        )
        monkeypatch.setattr(
            trainer.distributed.consensus,
            "broadcast_json",
            lambda rank, value: {
                "host": f"host{rank // 2}",
                "groups": facts[rank],
            },
        )
        try:
            require_same_on_all_ranks(facts[0])
        except InputError as error:
            return str(error)
        return None

    return of


def with_seeds(*seeds):
    return [
        {
            "another dataset": {"fingerprint": "f"},
            "other settings": {"seed": seed, "dim": 8},
        }
        for seed in seeds
    ]


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (with_seeds(1, 1, 1), None),
        (
            with_seeds(1, 2),
            "rank 1 on host0 has other settings (seed 2, rank 0 on host0 has 1): give all ranks the same",
        ),
        (
            with_seeds(9, 1, 1, 1),
            "rank 0 on host0 has other settings (seed 9, rank 1 on host0 has 1): give all ranks the same",
        ),
        (
            with_seeds(1, 1, 1, 2, 3),
            "rank 3 on host1 has other settings (seed 2, rank 0 on host0 has 1); "
            "rank 4 on host2 has other settings (seed 3, rank 0 on host0 has 1): give all ranks the same",
        ),
        (
            [
                {"another dataset": {"fingerprint": "f"}},
                {"another dataset": {"fingerprint": "g", "more": 1}},
            ],
            "rank 1 on host0 has another dataset (fingerprint g, rank 0 on host0 has f; more 1, rank 0 on host0 has not set): "
            "give all ranks the same",
        ),
    ],
)
def test_those_that_differ_from_most_are_named(compared, facts, says):
    assert compared(facts) == says


def test_many_are_counted(compared):
    says = compared(with_seeds(*[1] * 60, *range(100, 152)))
    assert (
        says.count("has other settings") == 4
        and "; and 48 more ranks: give" in says
    )
    says = compared(
        [
            {"other settings": {f"key{n}": n * rank for n in range(1, 9)}}
            for rank in (0, 1)
        ]
    )
    assert says.count("rank 0 on host0 has") == 4 and "; and 4 more)" in says


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (InputError("by the test"), InputError, "by the test"),
        (LateStorage("by the test"), LateStorage, "by the test"),
        (
            OSError(errno.EACCES, os.strerror(errno.EACCES), "/data"),
            InputError,
            "/data: Permission denied",
        ),
        (
            OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data"),
            LateStorage,
            "/data: Stale file handle",
        ),
    ],
)
def test_what_all_meet_is_said_as_it_is_and_what_some_meet_with_their_names(
    ranks, monkeypatch, error, kind, says
):
    def fail():
        raise error

    with pytest.raises(InputError, match=f"^{says}$") as raised:
        run_on_all_ranks(fail)
    assert type(raised.value) is kind
    real = trainer.distributed.consensus._gather_numbers
    monkeypatch.setattr(
        trainer.distributed.consensus,
        "_gather_numbers",
        lambda numbers: [*real(numbers), [0, 0], [0, 0]],
    )
    with pytest.raises(
        InputError, match=f"^rank 0 on {socket.gethostname()}: {says}$"
    ):
        run_on_all_ranks(fail)


def test_a_fault_is_raised_as_it_is(ranks):
    with pytest.raises(ZeroDivisionError):
        run_on_all_ranks(lambda: 1 // 0)
    assert run_on_all_ranks(lambda: 5) == 5
