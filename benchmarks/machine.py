"""What a figure was measured on: the machine, the versions, the commit; and what Linux says of
memory and of the page cache.
"""

import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

_PACKAGES = (
    *(
        "torch",
        "torchrec",
        "fbgemm-gpu-cpu",
        "fbgemm-gpu",
        "deepspeed",
        "numpy",
    ),
    *("safetensors", "xxhash", "webdataset", "pyarrow", "duckdb", "recbole"),
)


def memory_bytes() -> int:
    """The machine's memory, or what a control group leaves of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        path.read_text().strip()
        for path in map(Path, _MEMORY_LIMITS)
        if path.is_file()
    ]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


_MEMORY_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def describe(device: torch.device) -> dict:
    """Facts for the JSON: processor, cores, memory in bytes, load before the run, Python,
    packages, commit.
    """
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else "cpu",
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {
            name: version for name in _PACKAGES if (version := _version(name))
        },
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_TUNING)
        },
        **_commit(),
    }


# What changes figures without changing code.
_TUNING = (
    "OMP_",
    "MKL_",
    "KMP_",
    "MALLOC_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "TORCH_",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
)


def _processor():
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    def git(*arguments):
        folder = Path(__file__).resolve().parent
        finished = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True
        )
        return finished.stdout.strip() if finished.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:
        commit = None
    # What the benchmarks write themselves is no change of what they measure.
    own = (
        ":(top,exclude)benchmarks/results",
        ":(top,exclude)benchmarks/README.md",
    )
    return {
        "commit": commit,
        "uncommitted_changes": bool(git("status", "--porcelain", ":/", *own))
        if commit
        else None,
    }


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: CUDA from compute capability
    8.0, x86 by AVX-512 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = Path("/proc/cpuinfo")
    flags = re.search(
        r"^flags\s*:(.*)$", info.read_text() if info.is_file() else "", re.M
    )
    return bool(flags) and not {"avx512_bf16", "amx_bf16"}.isdisjoint(
        flags[1].split()
    )


def file_system(folder: Path) -> str | None:
    """The kind of file system that a folder lies on, None where it cannot be told."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    points = {
        Path(line.split()[1]): line.split()[2] for line in lines
    }  # of two at one place the later one is seen
    return next(
        (
            points[place]
            for place in [folder.resolve(), *folder.resolve().parents]
            if place in points
        ),
        None,
    )


def drop_from_cache(files: list[Path]) -> bool:
    """Asks the page cache to forget files; True where at most a hundredth of them is in it
    afterwards.
    """
    files = [file for file in files if file.stat().st_size]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # what is not on disk yet stays
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return (
        sum(map(cached_bytes, files))
        <= sum(file.stat().st_size for file in files) / 100
    )


def cached_bytes(file: Path) -> int:
    """How much of a file, not an empty one, is in the page cache, in whole pages."""
    with (
        open(file, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as pages,
    ):
        size = len(pages)
        cached = ctypes.create_string_buffer(
            -(-size // mmap.PAGESIZE)
        )  # a byte a page, its lowest bit: it is there
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)),
            ctypes.c_size_t(size),
            cached,
        )
        del start  # it holds the mapping
    return size if failed else cached.raw.count(1) * mmap.PAGESIZE


def reset_peak_memory() -> int | None:
    """Lets `peak_memory` begin anew; returns the memory that is held now, in bytes, None where
    Linux's files do not say.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier saves left free would be taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def cpu_seconds_by_child() -> dict[int, float]:
    """What each of this process's descendants that run now has computed, those included that it
    waited for, by its number. On all cores.
    """
    parent_of = {}
    seconds_of = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended meanwhile
            continue
        # Behind its name, which stands in brackets: its state, its parent, …, its times and those
        # of its children that have ended.
        fields = text.rpartition(")")[2].split()
        process = int(stat.parent.name)
        parent_of[process] = int(fields[1])
        seconds_of[process] = sum(map(int, fields[11:15])) / _TICKS
    of_child = {}
    for process, seconds in seconds_of.items():
        above = parent_of.get(process)
        while above and above != os.getpid():
            above = parent_of.get(above)
        if above:
            of_child[process] = seconds
    return of_child


_TICKS = os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """The most memory, in bytes, that this process held since `reset_peak_memory`."""
    return _status("VmHWM")


def peak_device_memory(device: torch.device) -> int | None:
    """The most bytes of the device that tensors held; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device)


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(name)
    )
