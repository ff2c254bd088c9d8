"""Two network namespaces as two hosts: `deepspeed` on each."""

import json
import time

import numpy as np
import pytest

from benchmarks.namespaces import ip, two_hosts, why_not
from tests.helpers import HELPERS
from tests.helpers.left import assert_same, losses
from tests.helpers.links_worker import STEPS, Draw
from tests.helpers.namespaces import finish, servers, start
from tests.helpers.stages import SETTINGS
from tests.ranks.conftest import deepspeed, ranks_of, run
from trainer.checkpoint.layout import list_checkpoints
from trainer.planning.traffic import BETWEEN, ROWS, Copies, expected

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
@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_a_copy_a_host_keeps_rows_within_hosts(
    hosts, forked, tmp_path, exponent
):
    """Counted by the interfaces: what passes the cable is what the plan says, and both tables are the same."""
    rows, dim, ids = 20_000, 64, 4_000
    statuses, logs = finish(
        start(
            hosts,
            forked,
            tmp_path,
            HELPERS.joinpath("links_worker.py"),
            *(tmp_path, rows, dim, ids, exponent),
            port=29791,
            slots=2,
        ),
        tmp_path,
    )
    assert statuses == [0, 0], "\n".join(log[-4000:] for log in logs)
    draw = Draw(rows, ids, exponent)
    found = {}
    for size in (0, 2):
        copies = None
        if size:
            copies = Copies(2, distinct(draw, 2), distinct(draw, 4))
        sharing = size or 4
        by_part = expected(
            *(4, dim, 1, 1, 0, 0),
            foreign=ids * (sharing - 1) / sharing,
            copies=copies,
        )
        of_rows = sum(by_part[part] for part in ROWS)
        between = 2 * of_rows * (0 if size else 2 / 3)
        inside = 2 * of_rows - between
        for part in BETWEEN:
            between += 2 * by_part.get(part, 0)
        for rank in (0, 2):
            sent = json.loads((tmp_path / f"{size}-{rank}.json").read_text())
            found[size, rank] = sent
            assert sent["inside"] == pytest.approx(inside, rel=0.1)
            assert sent["between"] == pytest.approx(between, rel=0.1)
    print(exponent, {key: found[key] for key in found})
    one, two = (table_of(tmp_path, size) for size in (0, 2))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-7)


def distinct(draw, ranks):
    """Rows that the first so many ranks look up in a step, the mean over steps."""
    counts = []
    for step in range(STEPS):
        ids = [draw.ids_of(step, rank).numpy() for rank in range(ranks)]
        counts.append(len(np.unique(np.concatenate(ids))))
    return np.mean(counts)


def table_of(folder, size):
    """The table's vectors in the order of stored rows."""
    shards = [np.load(folder / f"{size}-{rank}.npz") for rank in range(4)]
    shards.sort(key=lambda shard: shard["first"])
    return np.concatenate([shard["weight"] for shard in shards])


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
