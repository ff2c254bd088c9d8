import time
from itertools import product

import pytest

from trainer.distributed.agreement import (
    Signals,
    reduce_signals,
    run_on_first_rank,
)
from trainer.errors import InputError
from trainer.files.atomic import LateStorage


@pytest.mark.parametrize("said", product([False, True], repeat=4))
def test_ranks_agree_on_each_thing_by_itself(ranks, said):
    assert reduce_signals(*said) == Signals(*said)
    trouble, stop, due, writing = said
    assert reduce_signals(
        writing=writing, due=due, stop=stop, trouble=trouble
    ) == Signals(*said)


def test_nothing_said_is_nothing_agreed_on(ranks):
    assert reduce_signals() == Signals()


def test_what_the_first_rank_alone_does_is_told_to_all(ranks):
    assert run_on_first_rank(lambda: {"a": [1, None, "ü"]}, True) == {
        "a": [1, None, "ü"]
    }
    assert run_on_first_rank(lambda: time.sleep(1.2), True) is None


def test_what_the_first_rank_alone_meets_is_raised(ranks):
    def refuse():
        raise InputError("log.csv: row 3")

    with pytest.raises(InputError, match=r"log\.csv: row 3"):
        run_on_first_rank(refuse, True)
    with pytest.raises(ZeroDivisionError):
        run_on_first_rank(lambda: 1 // 0, True)


def test_what_the_first_rank_alone_meets_keeps_its_status(ranks):
    """A storage that is late is tried again, what is wrong is not."""

    def be_late():
        raise LateStorage("part.parquet: is not seen on this host")

    with pytest.raises(InputError) as late:
        run_on_first_rank(be_late, True)
    assert late.value.status == LateStorage.status == 5
