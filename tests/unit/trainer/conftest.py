import pytest
import torch

from tests.helpers.alone import group_of_one
from tests.helpers.runs import rank_of_one
from trainer.distributed.process_group import Ranks


@pytest.fixture
def ranks():
    """This process as the only rank."""
    with group_of_one():
        yield Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def group():
    """This process as the only rank, as a launcher would describe it: engines may be built."""
    with rank_of_one() as ranks:
        yield ranks
