"""Two network namespaces as two hosts: `deepspeed` on each."""

import time

import numpy as np
import pytest

from benchmarks.namespaces import ip, two_hosts, why_not
from tests.helpers import HELPERS
from tests.helpers.left import assert_same, losses
from tests.helpers.namespaces import finish, servers, start
from tests.helpers.stages import SETTINGS
from tests.ranks.conftest import deepspeed, ranks_of, run
from trainer.checkpoint.layout import list_checkpoints

STAGES, FAULTY = (HELPERS.joinpath(name) for name in ("stages.py", "faulty.py"))


@pytest.fixture
def hosts():
    """[(namespace, interface, address)] of each host."""
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def forked(hosts):
    with servers(hosts) as forked:
        yield forked


def test_two_hosts_train_as_two_local_ranks(hosts, forked, dataset, tmp_path):
    steps = "max_steps=5"
    statuses, logs = finish(
        start(
            hosts,
            forked,
            tmp_path,
            STAGES,
            dataset,
            tmp_path / "two",
            "1",
            steps,
            port=29761,
        ),
        tmp_path,
    )
    assert statuses == [0, 0], "\n".join(log[-4000:] for log in logs)
    run(ranks_of(2, STAGES, dataset, tmp_path / "local", "1", steps))
    two, local = (losses(tmp_path / name / "1") for name in ("two", "local"))
    assert len(local) == 5
    np.testing.assert_allclose(
        list(two.values()), list(local.values()), rtol=1e-6
    )


@pytest.mark.slow
def test_a_cut_link_ends_both_and_the_same_command_goes_on(
    hosts, forked, dataset, tmp_path
):
    """In mid-epoch, and without a word to either host: packets get lost from then on."""
    settings = [
        "max_steps=0",
        "epochs=40",
        "evaluation.every_epochs=40",
        "checkpoint.every_epochs=1",
    ]
    settings += [
        "timeout_minutes=0.1",
        "checkpoint.every_steps=4",
        "optimizer.schedule=constant",
    ]
    folder = tmp_path / "two"
    arguments = [f"data={dataset}", f"run={folder}", *SETTINGS, *settings]
    processes = start(hosts, forked, tmp_path, FAULTY, *arguments, port=29771)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (
        not list_checkpoints(folder)
        or list_checkpoints(folder)[0].name < "step-00000020"
    ):
        time.sleep(0.02)
    name, cable, _ = hosts[1]
    ip("-n", name, "link", "set", cable, "down")
    # The time given is for machines that are busy; each rank gives up after 6 s, DeepSpeed's launcher some time later.
    statuses, logs = finish(processes, tmp_path, timeout=120)
    for rank, (status, log) in enumerate(zip(statuses, logs, strict=True)):
        assert status not in (0, None), log[-4000:]
        assert (
            f"error: rank {rank}: " in log
            and "the same command goes on from the last checkpoint" in log
        ), log[-4000:]
    reached = max(losses(folder))
    assert 20 <= reached < 560
    ip("-n", name, "link", "set", cable, "up")
    settings += ["timeout_minutes=5", "epochs=6", "evaluation.every_epochs=6"]
    if (
        reached >= 75
    ):  # a fast machine: so many steps that there is something left
        settings += [f"epochs={reached // 15 + 2}"]
    arguments = [f"data={dataset}", f"run={folder}", *SETTINGS, *settings]
    statuses, logs = finish(
        start(hosts, forked, tmp_path, FAULTY, *arguments, port=29781), tmp_path
    )
    assert statuses == [0, 0], "\n".join(log[-4000:] for log in logs)
    assert "goes on from" in logs[0]
    run(
        deepspeed(
            2,
            FAULTY,
            f"data={dataset}",
            f"run={tmp_path / 'local'}",
            *SETTINGS,
            *settings,
        )
    )
    assert_same(folder, tmp_path / "local", tolerance=1e-6)
