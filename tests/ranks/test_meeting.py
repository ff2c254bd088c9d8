"""Two ranks that do not have the same dataset, settings, versions or checkpoint, or see on a shared
storage what is there only late."""

import json
import re
import socket

import pytest

from tests.helpers import HELPERS
from tests.helpers.stages import SETTINGS
from tests.ranks.conftest import deepspeed, ranks_of, run
from trainer.config.prepare import PrepareConfig
from trainer.data.format.dataset import Dataset
from trainer.data.prepare.pipeline import prepare

HOST = re.escape(socket.gethostname())
STEPS = ["step-00000003", "step-00000002", "step-00000001"]


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    """copy0 and copy1, of the same logs with other seeds; host0 and host1, both copy0."""
    folder = tmp_path_factory.mktemp("meeting")
    (folder / "copy0").symlink_to(dataset)
    prepare(
        PrepareConfig(
            inputs=(str(dataset.parent / "logs"),),
            output=str(folder / "copy1"),
            seed=5,
        )
    )
    for host in ("host0", "host1"):
        (folder / host).symlink_to(dataset)
    return folder


@pytest.fixture(scope="module")
def met(folder):
    """What tests/helpers/meeting.py finds, of both ranks."""
    done = run(
        ranks_of(2, HELPERS.joinpath("meeting.py"), folder),
        timeout=500,
        OMP_NUM_THREADS="1",
        PYTHONPATH=".",
    )
    return [
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)
    ], done


REFUSED = {
    "another_dataset": r"rank 1 on HOST has another dataset \(fingerprint \w+, rank 0 on HOST has \w+\): give all ranks",
    "other_settings": r"rank 1 on HOST has other settings \(model.eta 0.6, rank 0 on HOST has 0.5; seed 1, rank 0 .* has 0\)",
    "other_versions": r"rank 1 on HOST has other versions \(torchrec 0.9, rank 0 on HOST has [\d.+a-z]+\)",
    "no_dataset": r"rank 1 on HOST: \S+/nowhere is not a dataset folder \(no dataset.json in it\)",
    "no_dataset_anywhere": r"\S+/nowhere is not a dataset folder",
    "evaluation_of_another_dataset": r"rank 1 on HOST has another dataset \(fingerprint",
    "no_newest_checkpoint": r"rank 1 on HOST: does not see \S+/apart1/checkpoints/step-00000003/manifest.json \(No such file",
    "another_newest_checkpoint": r"rank 1 on HOST: has another \S+/other1/checkpoints/step-00000003/manifest.json",
}


@pytest.mark.parametrize(("case", "says"), REFUSED.items(), ids=REFUSED)
def test_who_does_not_have_the_same_is_named_by_all(met, case, says):
    first, second = (rank[case] for rank in met[0])
    assert (
        first == second and first["status"] == 2 and "\n" not in first["says"]
    )
    assert re.match(says.replace("HOST", HOST), first["says"]), first["says"]


def test_a_fault_of_one_rank_ends_the_other_too(met):
    first, second = (rank["a_fault"] for rank in met[0])
    assert second == "raised by the test" and first["status"] == 4
    assert re.match(
        rf"rank 1 on {HOST}: failed \(ZeroDivisionError\): its own lines say why",
        first["says"],
    )


def test_nothing_is_left_of_what_did_not_begin(met, folder):
    assert not (folder / "refused").exists()


PASSED = {
    "equal": STEPS,
    "evaluation": ["step-00000003", 3, 400],
    "late_parts": STEPS,
    "short_parts": STEPS[2:],
    "after_parts_that_never_came": STEPS,
    "a_late_newest": ["step-00000003", 3],
    "a_late_listing": ["step-00000003", 3],
    "short_attributes": ["step-00000003", 3],
    "stale_handles": ["step-00000003", 3],
    "a_late_best": ["step-00000003", 3, 3],
    "a_file_too_many": [["step-00000003", 3], STEPS],
    "late_newest_users": [True, 7],
}


@pytest.mark.parametrize(("case", "found"), PASSED.items(), ids=PASSED)
def test_what_is_the_same_passes_however_late_it_is_seen(met, case, found):
    assert [rank[case] for rank in met[0]] == [found, found]


def test_parts_that_never_come_end_the_run_with_a_status_that_is_begun_again(
    met,
):
    first, second = (rank["parts_that_never_come"] for rank in met[0])
    assert first["status"] == second["status"] == 5
    assert re.search(
        r"step-00000001.partial: the checkpoint cannot be written \(table-00001-of-00002",
        first["says"],
    )
    assert "run=DIR has to be one folder, which all hosts see" in first["says"]


def test_a_dataset_that_is_missing_on_one_host_is_said_on_the_launchers_output(
    folder, tmp_path
):
    script = tmp_path / "as_on_two_hosts.py"
    script.write_text(
        "import os, sys\n"
        "sys.argv = [word.replace('HERE', os.environ['RANK']) for word in sys.argv]\n"
        "import launch.train\nfrom trainer.distributed.process_exit import run_script\nrun_script(launch.train.main)\n"
    )
    (tmp_path / "data0").symlink_to(folder / "copy0")
    words = [f"data={tmp_path}/dataHERE", f"run={tmp_path}/run", *SETTINGS]
    done = run(deepspeed(2, script, *words), status=(2,), PYTHONPATH=".")
    assert re.search(
        rf"^error: rank 1 on {HOST}: {tmp_path}/data1 is not a dataset folder",
        done.stderr,
        re.M,
    )
    assert (
        "lost the others" not in done.stderr and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "run").exists() and Dataset.load(tmp_path / "data0")
