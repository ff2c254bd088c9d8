"""The launchers that set no RANK, for real: one run, one world, the losses that DeepSpeed's own launcher gives."""

import json
import os
import shutil
import socket
import subprocess

import pytest

from tests.helpers import HELPERS, slurm
from tests.helpers.left import losses
from tests.helpers.rank_processes import forked_python
from tests.ranks.conftest import (
    BIN,
    MODEL,
    ROOT,
    SETTINGS,
    deepspeed,
    free_port,
    run,
)

PYTHON = str(BIN / "python")
WHERE = HELPERS.joinpath("where.py")
STEPS = [*SETTINGS, *MODEL, "log.every=1", "stream.workers=0"]
MPIRUN = ["mpirun", "--oversubscribe"]
if os.geteuid() == 0:
    MPIRUN.append("--allow-run-as-root")
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None,
    reason="mpirun: not installed (apt-get install openmpi-bin)",
)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    """What two ranks of `deepspeed --num_gpus 2` log."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    run(
        deepspeed(
            2, "launch/train.py", f"data={dataset}", f"run={folder}", *STEPS
        ),
        OMP_NUM_THREADS="1",
    )
    assert len(losses(folder)) == 3
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a Slurm of two nodes."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {name: environment[name] for name in ("SLURM_CONF", "PATH")}


def assert_one_run(folder, expected):
    """One run of two ranks, with the losses of the other to the digit."""
    assert losses(folder) == losses(expected)
    states = [
        json.loads(file.read_text())
        for file in folder.glob("checkpoints/*/state.json")
    ]
    assert len(states) == 1
    assert (
        len(list(folder.glob("checkpoints/*/table-*-of-00002.safetensors")))
        == 2
    )


def train(command, dataset, folder, *settings, **environment):
    command = [
        *command,
        forked_python(),
        "launch/train.py",
        f"data={dataset}",
        f"run={folder}",
        *STEPS,
        *settings,
    ]
    return run(command, OMP_NUM_THREADS="1", **environment)


def told(done):
    """What each process of where.py printed, by rank."""
    found = [
        json.loads(line)
        for line in done.stdout.splitlines()
        if line.startswith("{")
    ]
    return sorted(found, key=lambda one: int(one["RANK"]))


@needs_mpirun
def test_mpirun_trains_one_run(dataset, expected, tmp_path):
    train([*MPIRUN, "-np", "2"], dataset, tmp_path / "run")
    assert_one_run(tmp_path / "run", expected)


def test_srun_trains_one_run(cluster, dataset, expected, tmp_path):
    """A task on each of two nodes: the first one's name is the address."""
    train(
        ["srun", "-N", "2", "-n", "2", "--kill-on-bad-exit=1"],
        dataset,
        tmp_path / "run",
        **cluster,
    )
    assert_one_run(tmp_path / "run", expected)


@needs_mpirun
def test_mpirun_says_all_that_a_rank_has_to_know():
    ranks = told(run([*MPIRUN, "-np", "3", PYTHON, str(WHERE)]))
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in ranks] == [
        ("0", "0"),
        ("1", "1"),
        ("2", "2"),
    ]
    same = {
        (
            one["WORLD_SIZE"],
            one["LOCAL_WORLD_SIZE"],
            one["MASTER_ADDR"],
            one["MASTER_PORT"],
        )
        for one in ranks
    }
    assert len(same) == 1 and next(iter(same))[:3] == ("3", "3", "127.0.0.1")


@needs_mpirun
def test_a_job_of_one_task_is_alone():
    (one,) = told(run([*MPIRUN, "-np", "1", PYTHON, str(WHERE)]))
    assert (one["RANK"], one["WORLD_SIZE"]) == ("0", "1")


def test_srun_says_all_that_a_rank_has_to_know(cluster):
    ranks = told(
        run(["srun", "-N", "2", "-n", "3", PYTHON, str(WHERE)], **cluster)
    )
    assert [
        (one["RANK"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"])
        for one in ranks
    ] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
        ("2", "0", "1"),
    ]
    same = {
        (one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"])
        for one in ranks
    }
    assert len(same) == 1 and next(iter(same))[:2] == ("3", slurm.HOST)
    (one,) = told(run(["srun", "-n", "1", PYTHON, str(WHERE)], **cluster))
    assert (one["RANK"], one["WORLD_SIZE"]) == ("0", "1")


@needs_mpirun
def test_mpirun_within_a_slurm_job_is_mpiruns_world(cluster):
    """In the batch step of an allocation of two tasks."""
    command = [
        "srun",
        "-n",
        "1",
        *MPIRUN,
        "--mca",
        "plm",
        "isolated",
        "--mca",
        "ras",
        "^slurm",
        "-np",
        "2",
        PYTHON,
        str(WHERE),
    ]
    ranks = told(run(command, **cluster))
    assert [
        (one["RANK"], one["WORLD_SIZE"], one["MASTER_ADDR"]) for one in ranks
    ] == [
        ("0", "2", "127.0.0.1"),
        ("1", "2", "127.0.0.1"),
    ]


def test_a_batch_script_that_forgets_srun_is_refused(
    cluster, dataset, tmp_path
):
    """Of an allocation of two tasks it starts one process, which would train alone on what two were asked for."""
    script = tmp_path / "job.sh"
    words = f"{forked_python()} {ROOT}/launch/train.py data={dataset} run={tmp_path}/run {' '.join(STEPS)}"
    script.write_text(f"#!/bin/sh\n#SBATCH -n 2 -N 2\n{words}\n")
    output = tmp_path / "out"
    command = [
        "sbatch",
        "--wait",
        "--export=ALL",
        "-o",
        str(output),
        str(script),
    ]
    run(command, status=(2,), PYTHONPATH=str(ROOT), **cluster)
    assert output.read_text().startswith(
        "error: SLURM_NTASKS is 2, and this process was not started by srun"
    ), output.read_text()
    assert not (tmp_path / "run").exists()


@needs_mpirun
def test_a_world_that_is_missing_is_refused(dataset, tmp_path):
    """Two tasks without a word on which is which, and a RANK that both have."""
    folder = tmp_path / "run"
    command = [
        forked_python(),
        "launch/train.py",
        f"data={dataset}",
        f"run={folder}",
        *STEPS,
    ]
    done = run(command, status=(2,), SLURM_NTASKS="2", SLURM_PROCID="1")
    assert (
        done.stderr.count("\n") == 1
        and "SLURM_NTASKS is 2, and this process was not started by srun"
        in done.stderr
    )
    done = run(
        [*MPIRUN, "-np", "2", "-x", "RANK=0", "-x", "WORLD_SIZE=1", *command],
        status=(2,),
    )
    assert (
        "error: RANK is 0 and WORLD_SIZE is 1, but this is process"
        in done.stderr
    )
    done = run(command, status=(2,), RANK="a", WORLD_SIZE="2")
    assert (
        done.stderr.startswith("error: RANK is 'a', which is no number")
        and done.stderr.count("\n") == 1
    )
    assert not folder.exists()


def test_a_port_that_another_program_has_is_named(dataset, tmp_path):
    script = tmp_path / "impatient.py"
    script.write_text(
        "import launch.train\n"
        "from trainer.distributed import process_exit, process_group\n"
        "process_group._PORT_IS_FREE = 1.0  # not 15 s\n"
        "process_exit.run_script(launch.train.main)\n"
    )
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        place = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [
            PYTHON,
            script,
            f"data={dataset}",
            f"run={tmp_path / 'run'}",
            *STEPS,
        ]
        done = run(command, status=(2,), PYTHONPATH=str(ROOT), **place)
    assert (
        f"error: port {port} (MASTER_PORT) on " in done.stderr
        and "is in use" in done.stderr
    )
    assert (
        "lost the others" not in done.stderr
        and done.stderr.count("error: ") == 1
    )


@pytest.mark.slow
@needs_mpirun
def test_a_rank_that_is_killed_is_a_status_that_mpirun_reports(
    dataset, tmp_path
):
    """With --max-restarts the rank's process is a supervisor, which outlives it."""
    folder = tmp_path / "run"
    command = [*MPIRUN, "-np", "2", PYTHON, str(HELPERS.joinpath("faulty.py"))]
    command += [
        f"data={dataset}",
        f"run={folder}",
        *STEPS,
        "--max-restarts",
        "1",
    ]
    fault = {"FAULT": f"2 1 KILL {tmp_path / 'fault'}", "OMP_NUM_THREADS": "1"}
    done = run(command, **fault)
    assert "rank 1: ended with signal 9; restart 1 of 1" in done.stderr
    assert losses(folder).keys() == {1, 2, 3}
    (tmp_path / "fault").unlink()
    shutil.rmtree(folder)
    done = subprocess.run(
        command[:-1] + ["0"],
        cwd=ROOT,
        env=os.environ | fault,
        capture_output=True,
        text=True,
    )
    assert done.returncode not in (0, 2), done.stderr[-2000:]
