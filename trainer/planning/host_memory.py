"""What this process has of the host's memory, and had at most, as Linux counts it."""

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # of proc(5): the peak begins anew


def reset_peak() -> int:
    """Lets `peak_bytes` begin anew. Returns the bytes that are resident now; 0 where Linux does not say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier work left free would be taken again unseen
    try:
        _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:
        return 0
    return resident_bytes()


def peak_bytes() -> int:
    """The most bytes that were resident since `reset_peak`."""
    return _read("VmHWM")


def resident_bytes() -> int:
    """Bytes that are resident now."""
    return _read("VmRSS")


def _read(name: str) -> int:
    """A line of the process's status, `VmRSS:  12345 kB`, in bytes; 0 where there is none."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0
