import pytest
import torch

from tests.helpers.alone import group_of_one
from trainer.distributed.process_group import Ranks


@pytest.fixture
def ranks():
    """This process as the only rank."""
    with group_of_one():
        yield Ranks(0, 1, 0, torch.device("cpu"))
