import time
from itertools import product

import pytest

from trainer.distributed.agreement import Signals, agree, by_the_first
from trainer.errors import InputError
from trainer.files.atomic import StorageLate


@pytest.mark.parametrize("said", product([False, True], repeat=4))
def test_ranks_agree_on_each_thing_by_itself(ranks, said):
    assert agree(*said) == Signals(*said)
    trouble, stop, due, writing = said
    assert agree(writing=writing, due=due, stop=stop, trouble=trouble) == Signals(*said)


def test_nothing_said_is_nothing_agreed_on(ranks):
    assert agree() == Signals()


def test_what_the_first_rank_alone_does_is_told_to_all(ranks):
    assert by_the_first(lambda: {"a": [1, None, "ü"]}, True) == {"a": [1, None, "ü"]}
    assert by_the_first(lambda: time.sleep(1.2), True) is None


def test_what_the_first_rank_alone_meets_is_raised(ranks):
    def refuse():
        raise InputError("log.csv: row 3")

    with pytest.raises(InputError, match=r"log\.csv: row 3"):
        by_the_first(refuse, True)
    with pytest.raises(ZeroDivisionError):
        by_the_first(lambda: 1 // 0, True)


def test_what_the_first_rank_alone_meets_keeps_its_status(ranks):
    """A storage that is late is tried again, what is wrong is not."""

    def be_late():
        raise StorageLate("part.parquet: is not seen on this host")

    with pytest.raises(InputError) as late:
        by_the_first(be_late, True)
    assert late.value.status == StorageLate.status == 5
