"""What one rank alone leaves in a folder, and what it says where it cannot write."""

import pytest
import torch
import torch.distributed as dist

from trainer.distributed.process_group import Ranks
from trainer.doctor.folder_probe import examine_folder

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left(tmp_path, exists):
    run = tmp_path / "run"
    if exists:
        run.mkdir()
        (run / "config.yaml").write_text("")
    facts = examine_folder(run, ALONE, True, 1.0)
    assert facts.problem == "" and facts.free > 0
    assert run.exists() == exists
    assert [path.name for path in tmp_path.rglob("*.yaml")] == [
        "config.yaml"
    ] * exists


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    facts = examine_folder(tmp_path / "file" / "run", ALONE, True, 1.0)
    assert facts.problem == "Not a directory"
