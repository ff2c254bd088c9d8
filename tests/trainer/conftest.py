import pytest
import torch

import trainer.files
from tests.alone import group_of_one
from trainer.distributed import Ranks


@pytest.fixture(autouse=True)
def nothing_is_late(monkeypatch):
    """What is not there on this machine's own disk will not come."""
    monkeypatch.setattr(trainer.files, "LATENESS", 0.0)


@pytest.fixture
def ranks():
    """This process as the only rank."""
    with group_of_one():
        yield Ranks(0, 1, 0, torch.device("cpu"))
