"""What a figure was measured on: the machine, the versions, the commit, and how fast it multiplies matrices."""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "deepspeed", "numpy")


def memory_bytes():
    """The machine's memory, or what a control group leaves of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in map(Path, _MEMORY_LIMITS) if path.is_file()]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def describe(device):
    """Facts for the JSON: processor, cores, memory in bytes, load before the run, Python, packages, commit."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_TUNING)},
        **_commit(),
    }


# What changes figures without changing code.
_TUNING = ("OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TORCH_", "ATEN_", "DNNL_", "ONEDNN_")


def _processor():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    def git(*arguments):
        folder = Path(__file__).resolve().parent
        finished = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return finished.stdout.strip() if finished.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:
        commit = None
    return {"commit": commit, "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None}


def matmul_rates(experts, tokens, dim, device, seconds=0.5):
    """FLOP/s of fp32 products, {shape: the best of three windows of `seconds`}: the model's own shapes, and a large square
    one, which no cache or thread boundary holds up.

    A multiply-add counts as two operations. Results go into one tensor, so that no memory is asked for between products.
    """
    shapes = {
        f"bmm ({experts}, {tokens}, {dim}) @ ({experts}, {dim}, {dim})": ((experts, tokens, dim), (experts, dim, dim)),
        f"bmm ({experts}, {tokens}, {dim}) @ ({experts}, {dim}, {3 * dim})": ((experts, tokens, dim), (experts, dim, 3 * dim)),
        f"mm ({experts * tokens}, {dim}) @ ({dim}, {dim})": ((experts * tokens, dim), (dim, dim)),
        "mm (1024, 1024) @ (1024, 1024)": ((1024, 1024), (1024, 1024)),
    }
    return {name: _rate(*pair, device, seconds) for name, pair in shapes.items()}


def _rate(left_shape, right_shape, device, seconds):
    left, right = torch.randn(left_shape, device=device), torch.randn(right_shape, device=device)
    out = left @ right
    operations = 2 * left.numel() * right_shape[-1]
    rates = []
    for _ in range(3):
        products, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in range(8):
                torch.matmul(left, right, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()
            products += 8
        rates.append(products * operations / elapsed)
    return max(rates)
