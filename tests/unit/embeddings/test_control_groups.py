"""What a job's control groups leave, by made-up folders of /proc and /sys."""

import pytest

from embeddings.control_groups import available_host_memory

GB = 2**30
HUGE = 9223372036854771712  # what version 1 says where there is no limit


def write(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(content) + "\n")


def machine(root, free, swap=0):
    write(
        root,
        {
            "proc/meminfo": f"MemTotal: {1000 * 2**20} kB\nMemAvailable: {free * 2**20} kB\nSwapFree: {swap * 2**20} kB"
        },
    )


def v2(path, limit, used, files=0):
    """A group's files."""
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    limit = limit if limit == "max" else limit * GB
    stat = f"anon 1\ninactive_file {files * GB}\nactive_file 7"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used * GB,
        f"{folder}/memory.stat": stat,
    }


def v1(path, limit, used, files=0):
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit
        if limit == HUGE
        else limit * GB,
        f"{folder}/memory.usage_in_bytes": used * GB,
        f"{folder}/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {files * GB}",
    }


JOB = "system.slice/slurmstepd.scope/job_7/step_0"
CASES = {
    "no groups": ("", {}, 500),
    "version 2, its own limit": (f"0::/{JOB}", v2(JOB, 64, 10), 54),
    "files that are only kept in case do not count": (
        f"0::/{JOB}",
        v2(JOB, 64, 10, files=4),
        58,
    ),
    "version 2, a limit above it": (
        f"0::/{JOB}",
        v2(JOB, "max", 10) | v2("system.slice/slurmstepd.scope/job_7", 32, 12),
        20,
    ),
    "the tightest of several": (
        f"0::/{JOB}",
        v2(JOB, 400, 10) | v2("system.slice", 100, 70),
        30,
    ),
    "version 2, none": (f"0::/{JOB}", v2(JOB, "max", 10), 500),
    "a limit beyond the machine": (f"0::/{JOB}", v2(JOB, 900, 10), 500),
    "a container that sees its own group as the root": (
        "0::/",
        v2("", 16, 6),
        10,
    ),
    "one whose path is its host's": ("0::/kubepods/pod1", v2("", 16, 7), 9),
    "version 1": (
        "4:memory:/slurm/uid_1/job_7\n1:name=systemd:/x",
        v1("slurm/uid_1/job_7", 48, 8, files=1),
        41,
    ),
    "version 1, a limit above it": (
        "4:memory:/job_7/step_0",
        v1("job_7/step_0", HUGE, 8) | v1("job_7", 24, 9),
        15,
    ),
    "version 1 beside version 2": (
        "3:cpu,memory:/a\n0::/a",
        v1("a", 12, 2),
        10,
    ),
    "version 1, none": ("4:memory:/a", v1("a", HUGE, 8), 500),
}


@pytest.mark.parametrize(("groups", "files", "left"), CASES.values(), ids=CASES)
def test_a_job_has_what_the_tightest_of_its_groups_leaves(
    tmp_path, groups, files, left
):
    machine(tmp_path, 500)
    write(tmp_path, files | ({"proc/self/cgroup": groups} if groups else {}))
    assert available_host_memory(tmp_path) == left * GB


def test_swap_counts_where_no_group_limits(tmp_path):
    machine(tmp_path, 500, swap=20)
    assert available_host_memory(tmp_path) == 520 * GB
