import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.launchers import (
    DEFAULT_PORT,
    World,
    describe_missing,
    device_of_rank,
    enter_world,
    expand_counts,
    expand_hosts,
    find_shared_device,
    read_world,
)
from trainer.errors import InputError

# What each launcher sets, as it was seen (Open MPI 4.1.4, Slurm 22.05) or is written in its sources.
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "1895628801",
}
HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "node[07,09]",
    "SLURM_JOB_NODELIST": "node[01-09]",
}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "node[01-02]",
}
SALLOC = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "node[01-02]",
}
ALONE = World(0, 1, 0, 1, "127.0.0.1", DEFAULT_PORT)


def without(variables, *names):
    return {
        name: value for name, value in variables.items() if name not in names
    }


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"WORLD_SIZE": "1"}, ALONE),
        (TORCHRUN, World(9, 16, 1, 8, "host0", 29400)),
        (DEEPSPEED, World(1, 2, 1, 2, "127.0.0.1", 29500)),
        (
            HYDRA | {"MASTER_ADDR": "a", "MASTER_PORT": "1234"},
            World(3, 4, 1, 2, "a", 1234),
        ),
        (MVAPICH | {"MASTER_ADDR": "a"}, World(3, 4, 1, 2, "a", DEFAULT_PORT)),
        (
            SRUN | {"MASTER_PORT": "5"},
            World(4, 5, 1, 2, "node07", 5, "SLURM_STEP_NODELIST"),
        ),
        (
            SRUN | {"MASTER_PORT": "5", "MASTER_ADDR": "b"},
            World(4, 5, 1, 2, "b", 5),
        ),
        # deepspeed --launcher mpich: its helper sets RANK and LOCAL_RANK.
        (
            HYDRA
            | {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "a",
            },
            World(3, 4, 1, 2, "a", DEFAULT_PORT),
        ),
        # WORLD_SIZE alone goes with the launcher's rank.
        (
            HYDRA | {"WORLD_SIZE": "4", "MASTER_ADDR": "a"},
            World(3, 4, 1, 2, "a", DEFAULT_PORT),
        ),
        (
            {"PMIX_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            World(1, 2, None, None, "a", DEFAULT_PORT),
        ),
        # No word on the host's ranks: they are found by the hosts' names.
        (
            without(HYDRA, "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
            | {"MASTER_ADDR": "a"},
            World(3, 4, None, None, "a", DEFAULT_PORT),
        ),
        # Jobs of one task.
        (
            without(OPEN_MPI, "x")
            | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
            None,
        ),
        (
            SRUN
            | {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "1",
            },
            None,
        ),
        (BATCH | {"SLURM_NTASKS": "1"}, None),
        (BATCH | {"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_a_launchers_world(environment, world):
    read = read_world(environment)
    if world is None:
        assert (read.rank, read.size, read.local_rank, read.local_size) == (
            0,
            1,
            0,
            1,
        )
    else:
        assert read == world


def test_a_port_goes_with_the_job():
    ports = {
        read_world(SRUN | {"SLURM_JOB_ID": str(job)}).port for job in range(50)
    }
    ports |= {
        read_world(SRUN | {"SLURM_STEP_ID": str(step)}).port
        for step in range(1, 50)
    }
    assert len(ports) > 95 and all(10240 <= port < 30240 for port in ports)
    assert (
        read_world(SRUN).port
        == read_world(
            SRUN
            | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
        ).port
    )
    one, other = (
        read_world(OPEN_MPI | {"PMIX_NAMESPACE": name})
        for name in ("1895628801", "1895694337")
    )
    assert one.port != other.port and one.address == "127.0.0.1"


def test_mpirun_within_an_allocation_is_mpiruns_world():
    """Its helpers are started by srun, one a node; the ranks inherit the helper's variables."""
    helper = SRUN | {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }
    assert (
        read_world(helper | OPEN_MPI).rank,
        read_world(helper | OPEN_MPI).size,
    ) == (
        1,
        2,
    )
    world = read_world(helper | HYDRA)
    assert (world.rank, world.size, world.address) == (3, 4, "node07")
    # srun --mpi=pmi2 sets both alike: Slurm knows more of the host.
    pmi2 = read_world(SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"})
    assert pmi2 == read_world(SRUN)


def test_torchrun_within_srun_is_torchruns_world():
    for launched in (SRUN, OPEN_MPI):
        assert replace(
            read_world(launched | TORCHRUN), derived_from=None
        ) == read_world(TORCHRUN)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "a"}, r"^RANK is 'a', which is no number"),
        ({"WORLD_SIZE": "x"}, r"^WORLD_SIZE is 'x', which is no number"),
        (
            {"RANK": "0", "WORLD_SIZE": ""},
            "^WORLD_SIZE is '', which is no number",
        ),
        (
            {"RANK": "-1", "WORLD_SIZE": "2"},
            "^RANK is '-1', which is no number",
        ),
        ({"RANK": "²", "WORLD_SIZE": "2"}, "^RANK is '²', which is no number"),
        (
            TORCHRUN | {"LOCAL_RANK": "b"},
            "^LOCAL_RANK is 'b', which is no number",
        ),
        (
            TORCHRUN | {"MASTER_PORT": "http"},
            "^MASTER_PORT is 'http', which is no number",
        ),
        (
            TORCHRUN | {"MASTER_PORT": "70000"},
            "^MASTER_PORT is 70000: ports run from 1 to 65535",
        ),
        (TORCHRUN | {"RANK": "16"}, "^rank 16 of 16: ranks run from 0"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "^rank 9 of 0"),
        (TORCHRUN | {"LOCAL_RANK": "8"}, "^local rank 8 of 8"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "17"},
            "^17 ranks on this host of 16 in all",
        ),
        ({"RANK": "0"}, "^RANK is 0 and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE is 2 and RANK is not set"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "^OMPI_COMM_WORLD_SIZE is 2 and OMPI_COMM_WORLD_RANK is not set",
        ),
        ({"PMI_SIZE": "2"}, "^PMI_SIZE is 2 and PMI_RANK is not set"),
        ({"PMI_RANK": "0"}, "^PMI_RANK is set and PMI_SIZE is not"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "^MV2_COMM_WORLD_SIZE is 2 and"),
        (
            {"PMIX_RANK": "0"},
            "^PMIX_RANK is 0, and how many processes there are is not known",
        ),
        (
            BATCH,
            r"^SLURM_NTASKS is 2, and this process was not started by srun: start it with `srun python …`",
        ),
        (
            SALLOC,
            "^SLURM_NTASKS is 2, and this process was not started by srun",
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            "^SLURM_NTASKS is 2, and this process was not started by srun",
        ),
        (
            OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"},
            "^RANK is 0 and WORLD_SIZE is 1, but this is process 1 of 2 that Open MPI's",
        ),
        (
            OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "2"},
            "^RANK is 0 and WORLD_SIZE is 2, but this is process 1 of 2 that Open MPI's",
        ),
        (
            OPEN_MPI | {"WORLD_SIZE": "4"},
            "^WORLD_SIZE is 4, but this is process 1 of 2",
        ),
        (
            SRUN | {"RANK": "0"},
            "^RANK is 0, but this is process 4 of 5 that srun started",
        ),
        (
            OPEN_MPI
            | {
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            "with -x MASTER_ADDR=…$",
        ),
        (
            HYDRA,
            "^the 4 ranks are on several hosts and MASTER_ADDR is not set: .* with -genv MASTER_ADDR …$",
        ),
        (
            SRUN | {"SLURM_STEP_NODELIST": "node[1"},
            r"^SLURM_STEP_NODELIST is 'node\[1', which names no hosts",
        ),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5"},
            "^SLURM_STEP_TASKS_PER_NODE is '5' and SLURM_NODEID is 1",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "x"},
            "^OMPI_COMM_WORLD_RANK is 'x', which is no number",
        ),
    ],
)
def test_a_world_that_cannot_be_known_is_refused(environment, line):
    with pytest.raises(InputError, match=line) as error:
        read_world(environment)
    assert "\n" not in str(error.value) and error.value.status == 2


def test_what_is_written_into_the_environment_is_read_again():
    for launched in (
        OPEN_MPI,
        SRUN,
        HYDRA | {"MASTER_ADDR": "a"},
        TORCHRUN,
        DEEPSPEED,
    ):
        environment = dict(launched)
        world = read_world(environment)
        enter_world(world, environment)
        assert replace(world, derived_from=None) == read_world(environment)
        assert environment["RANK"] == str(world.rank) and environment[
            "LOCAL_WORLD_SIZE"
        ] == str(world.local_size)


@pytest.mark.parametrize(
    ("rank", "local_rank", "local_size", "devices", "device"),
    [
        (0, 0, 1, 1, 0),
        (7, 3, 4, 4, 3),
        (7, 3, 4, 8, 3),
        (
            7,
            3,
            4,
            1,
            0,
        ),  # each sees one of its own; which others see is compared by their names
        (8, 0, 8, 1, 0),
        (2, 1, 2, 1, 0),
        (
            15,
            7,
            8,
            4,
            "local rank 7 of 8, and 4 devices are visible: two ranks would share one",
        ),
        (2, 2, 3, 2, "local rank 2 of 3, and 2 devices are visible"),
        (
            1,
            0,
            2,
            2,
            "rank 1 is local rank 0 of 2: ranks have to follow each other",
        ),
        (3, 0, 2, 8, "rank 3 is local rank 0 of 2"),
    ],
)
def test_a_rank_takes_a_device_that_no_other_takes(
    rank, local_rank, local_size, devices, device
):
    if isinstance(device, str):
        with pytest.raises(InputError, match=f"^{device}"):
            device_of_rank(rank, local_rank, local_size, devices)
    else:
        assert device_of_rank(rank, local_rank, local_size, devices) == device


@pytest.mark.parametrize(
    ("devices", "shared"),
    [
        ([], None),
        (["a 1", "a 2", "b 1", "b 2"], None),
        (["a 1", "a 1"], (0, 1)),
        (["a 1", "b 1", "a 2", "b 1", "b 1"], (1, 3)),
    ],
)
def test_ranks_that_share_a_device_are_told(devices, shared):
    assert find_shared_device(devices) == shared


# Slurm's lists.

HOSTS = [
    ("a", ["a"]),
    ("a,b", ["a", "b"]),
    ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
    ("node[9-11]", ["node9", "node10", "node11"]),
    ("a[1-2],b,c[08-10]", ["a1", "a2", "b", "c08", "c09", "c10"]),
    ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
]


SUFFIXED = [
    ("c[08-10]-x,b", ["c08-x", "c09-x", "c10-x", "b"])
]  # newer than Slurm 22.05


@pytest.mark.parametrize(("text", "hosts"), HOSTS + SUFFIXED)
def test_a_list_of_hosts(text, hosts):
    assert list(expand_hosts(text)) == hosts


@pytest.mark.ranks
@pytest.mark.skipif(
    shutil.which("scontrol") is None,
    reason="scontrol is not there: apt-get install slurm-wlm",
)
@pytest.mark.parametrize(("text", "hosts"), HOSTS)
def test_slurm_reads_it_alike(text, hosts, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=c\nSlurmctldHost=localhost\nNodeName=localhost\n"
    )
    command = ["scontrol", "show", "hostnames", text]
    done = subprocess.run(
        command,
        env={"SLURM_CONF": str(conf)},
        executable=shutil.which("scontrol"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == hosts, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a[",
        "a]",
        "a[1",
        "a[]",
        "a[x]",
        "a[1-]",
        "a[2-1]",
        "a[[1]]",
        "a,,b",
        "a b",
        "a[1-999999999]",
    ],
)
def test_what_is_no_list_of_hosts(text):
    with pytest.raises(ValueError):
        list(expand_hosts(text))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "gpu-", "n"]),
            st.integers(0, 999),
            st.integers(0, 20),
            st.integers(1, 4),
        ),
        min_size=1,
    )
)
def test_ranges_are_counted_out(parts):
    text, hosts = [], []
    for name, first, more, width in parts:
        text.append(f"{name}[{first:0{width}d}-{first + more:0{width}d}]")
        hosts += [
            f"{name}{number:0{max(width, len(str(first)))}d}"
            for number in range(first, first + more + 1)
        ]
    assert list(expand_hosts(",".join(text))) == hosts


@given(st.text(alphabet="a1[],-x ", max_size=30))
def test_no_list_is_read_as_something_else(text):
    """Hosts without brackets or blanks, or ValueError."""
    try:
        hosts = list(expand_hosts(text))
    except ValueError:
        return
    assert hosts and all(host and not set(host) & set("[] ,") for host in hosts)


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2])]
)
def test_counts_of_tasks(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(x3", "-1", "2(x9999999)"])
def test_what_counts_no_tasks(text):
    with pytest.raises(ValueError):
        expand_counts(text)


@pytest.mark.parametrize(
    ("hosts", "local_size", "slurm", "says"),
    [
        (
            ["a", "a", None, None],
            2,
            None,
            "rank 2 on host 1, rank 3 on host 1 did not come (a did)",
        ),
        (["a", None, "b", "b"], 2, None, "rank 1 on a did not come (a, b did)"),
        (
            ["n1", None, None, "n4"],
            1,
            "n[1-4]",
            "rank 1 on n2, rank 2 on n3 did not come (n1, n4 did)",
        ),
        (
            ["a", None],
            None,
            "n[",
            "rank 1 on a did not come (a did)",
        ),
        (
            ["a", "a", *[None] * 6],
            2,
            None,
            "rank 2 on host 1, rank 3 on host 1, rank 4 on host 2, "
            "rank 5 on host 2 and 2 more did not come (a did)",
        ),
    ],
)
def test_ranks_that_do_not_come_are_named_with_their_hosts(
    hosts, local_size, slurm, says
):
    world = World(0, len(hosts), 0, local_size, "a", 29500)
    environment = {} if slurm is None else {"SLURM_JOB_NODELIST": slurm}
    assert describe_missing(world, hosts, environment) == says
