import pytest
import torch

from tests.alone import group_of_one
from trainer.distributed import Ranks


@pytest.fixture
def ranks():
    """This process as the only rank."""
    with group_of_one():
        yield Ranks(0, 1, 0, torch.device("cpu"))
