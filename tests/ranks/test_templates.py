"""The templates of `launch/templates` as they stand: filled in, started, stopped, and started again by what a scheduler does."""

import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from tests.helpers import HELPERS, slurm
from tests.helpers.left import assert_same
from tests.helpers.rank_processes import ON_CPU, forked_python, free_port
from tests.ranks.conftest import MODEL, ROOT, SETTINGS, ranks_of, run

TEMPLATES = ROOT / "launch" / "templates"
STEPS = [
    *SETTINGS,
    *MODEL,
    "max_steps=12",
    "log.every=1",
    "stream.workers=0",
    "checkpoint.every_epochs=0",
    "checkpoint.every_minutes=0",
]
FAULT_STEP = 5


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """What two ranks leave that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    words = [f"data={dataset}", f"run={folder}", *STEPS]
    run(ranks_of(2, "launch/train.py", *words))
    return folder


@pytest.fixture
def python(tmp_path):
    """A folder whose `python` is forked, and trains with a fault where FAULT asks for one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "python"
    program.write_text(
        "#!/bin/sh\n"
        "script=$1\n"
        "shift\n"
        f"case $script in *train.py) script={HELPERS / 'faulty.py'} ;; esac\n"
        f'exec {forked_python()} "$script" "$@"\n'
    )
    program.chmod(0o700)
    return folder


def environment_with(python, **more):
    """This process's environment, with that `python` first."""
    path = os.pathsep.join([str(python), os.environ["PATH"]])
    given = {"PATH": path, "PYTHONPATH": str(ROOT), "WITHOUT_REPORT": "1"}
    return os.environ | ON_CPU | given | more


def wait_for(condition, seconds=120):
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- Slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a Slurm of two nodes."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {name: environment[name] for name in ("SLURM_CONF", "PATH")}


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_preempted_job_of_slurm_is_requeued_and_ends_as_one_that_was_not(
    cluster, dataset, undisturbed, python, tmp_path, nodes
):
    fault = tmp_path / "fault"
    environment = environment_with(
        python,
        PROJECT=str(ROOT),
        PYTHON=str(python / "python"),
        FAULT=f"{FAULT_STEP} 0 wait {fault}",
        **{"SLURM_CONF": cluster["SLURM_CONF"]},
    )
    environment["PATH"] = cluster["PATH"]

    def slurm_command(*words):
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state():
        shown = slurm_command("scontrol", "--oneliner", "show", "job", job)
        return re.search(r"JobState=(\w+)", shown)[1]

    head = ["--nodes", str(nodes), "--ntasks-per-node", str(2 // nodes)]
    head += ["--gpus-per-node=0", "--cpus-per-task=1"]
    words = [f"data={dataset}", f"run={tmp_path / 'run'}", *STEPS]
    submit = ["sbatch", "--parsable", *head, str(TEMPLATES / "train.sbatch")]
    job = slurm_command(*submit, *words).strip()
    output = tmp_path / f"syncrec-{job}.out"
    wait_for(fault.exists)
    slurm_command("scancel", "--signal=USR1", "--batch", job)
    time.sleep(3.0)  # it comes by way of four processes
    fault.with_name("fault.go").touch()
    wait_for(lambda: state() == "COMPLETED", 300)
    told = output.read_text()
    assert "attempt 1 on" in told and "attempt 2 on" in told, told
    assert "status 75," in told and "status 0," in told
    assert told.count("0 faults") == 2
    logs = sorted((tmp_path / f"syncrec-{job}").glob("*.log"))
    host = os.uname().nodename.split(".")[0]
    assert [log.stem for log in logs] == [f"{n}-{host}" for n in range(nodes)]
    assert "as asked" in logs[0].read_text()
    assert_same(tmp_path / "run", undisturbed)


# --- Kubernetes


def filled_in(name, folder, dataset, **values):
    """The template's objects by kind, after a person has filled in what is marked."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    settings = f"data={dataset} run={folder / 'run'} {' '.join(STEPS)}"
    text = text.replace(
        "data=/shared/data/shop run=/shared/runs/shop", settings
    )
    text = text.replace("value: eth0", "value: lo")
    for before, after in values.items():
        assert before in text
        text = text.replace(before, after)
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def start(container, environment, log):
    """A container's process as Kubernetes starts it: its command, arguments and environment, where the image has its code."""
    given = {}
    for variable in container["env"]:
        given[variable["name"]] = variable["value"]
    # The template's own values come last: those of its cluster before.
    words = [*container["command"], *container["args"]]
    with open(log, "a") as output:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env=given | environment,
            stdout=output,
            stderr=output,
        )


@pytest.mark.slow
def test_an_indexed_job_that_is_drained_goes_on(
    dataset, undisturbed, python, tmp_path
):
    """Two pods of one rank: one hears SIGTERM, both end with 75; the Job makes two new ones, which end with 0."""
    objects = filled_in(
        "indexed_job.yaml",
        tmp_path,
        dataset,
        **{'RANKS_PER_HOST, value: "8"': 'RANKS_PER_HOST, value: "1"'},
    )
    spec = objects["Job"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 2
    (container,) = spec["template"]["spec"]["containers"]
    fault = tmp_path / "fault"
    # What Kubernetes says, by its own variable and by its DNS.
    environment = environment_with(
        python,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        FAULT=f"{FAULT_STEP} 0 wait {fault}",
    )

    def start_pods():
        pods = []
        for index in range(2):
            own = environment | {"JOB_COMPLETION_INDEX": str(index)}
            pods.append(start(container, own, tmp_path / f"pod{index}"))
        return pods

    pods = start_pods()
    wait_for(fault.exists)
    pods[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    fault.with_name("fault.go").touch()
    said = tmp_path / "pod0"
    assert [pod.wait(120) for pod in pods] == [75, 75], said.read_text()
    assert [pod.wait(120) for pod in start_pods()] == [0, 0], said.read_text()
    assert said.read_text().count("0 faults") == 2
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_trainjob_trains_with_what_kubeflow_sets(
    dataset, undisturbed, python, tmp_path
):
    """One pod of two ranks."""
    objects = filled_in("trainjob.yaml", tmp_path, dataset)
    trainer = objects["TrainJob"]["spec"]["trainer"]
    environment = environment_with(
        python,
        PET_NNODES="1",
        PET_NPROC_PER_NODE="2",
        PET_NODE_RANK="0",
        PET_MASTER_ADDR="127.0.0.1",
        PET_MASTER_PORT=str(free_port()),
    )
    pod = start(trainer, environment, tmp_path / "pod")
    assert pod.wait(120) == 0, (tmp_path / "pod").read_text()
    assert_same(tmp_path / "run", undisturbed)


def test_a_fault_that_doctor_finds_ends_a_pod_with_its_status(
    dataset, python, tmp_path
):
    objects = filled_in("trainjob.yaml", tmp_path, tmp_path / "nothing")
    trainer = objects["TrainJob"]["spec"]["trainer"]
    place = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0"}
    place |= {"PET_MASTER_ADDR": "127.0.0.1"}
    place |= {"PET_MASTER_PORT": str(free_port())}
    environment = environment_with(python, **place)
    pod = start(trainer, environment, tmp_path / "pod")
    assert pod.wait(120) == 2
    said = (tmp_path / "pod").read_text()
    assert "not a dataset folder" in " ".join(said.split()), said
    assert not (tmp_path / "run").exists()


# --- ranks.sh


def start_ranks(tmp_path, program, ranks=2, **more):
    """ranks.sh with a shell program in place of Python."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o700)
    place = {"HOSTS": "2", "HOST_RANK": "1", "RANKS_PER_HOST": str(ranks)}
    place |= {"MASTER_ADDR": "host0", "PYTHON": str(python)} | more
    return subprocess.Popen(
        [TEMPLATES / "ranks.sh", "script", "a b"],
        cwd=tmp_path,
        env=os.environ | place,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_rank_of_a_host_knows_its_place(tmp_path):
    program = 'echo "$1 $2 $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"'
    output, _ = start_ranks(tmp_path, program).communicate(timeout=30)
    assert sorted(output.splitlines()) == [
        "script a b 2/4 0/2 host0:29500",
        "script a b 3/4 1/2 host0:29500",
    ]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("exit 0", 0),
        ("exit $((LOCAL_RANK * 2))", 2),
        # 4: another rank is gone.
        ("exit $((4 - LOCAL_RANK))", 3),
        ("exit $((3 + LOCAL_RANK))", 3),
        ("exit 4", 4),
        ("kill -KILL $$", 137),
    ],
)
def test_the_status_is_that_of_the_rank_that_is_the_cause(
    tmp_path, program, status
):
    assert start_ranks(tmp_path, program).wait(30) == status


def test_a_request_to_stop_comes_to_all_ranks_and_is_waited_for(tmp_path):
    program = (
        'trap "sleep 0.3; touch stopped$LOCAL_RANK; exit 75" TERM\n'
        "touch ready$LOCAL_RANK\n"
        "while true; do sleep 0.05; done"
    )
    process = start_ranks(tmp_path, program, ranks=3)
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert len(list(tmp_path.glob("stopped*"))) == 3
