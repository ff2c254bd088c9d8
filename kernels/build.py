"""The C++ kernels beside this file: each is compiled where it is first needed, for this machine's processor, and kept.

PyTorch's operations pass every intermediate tensor through memory; a kernel keeps it in registers and caches. What a kernel
does can also be done without it, more slowly: so whoever uses one asks `missing` first.
"""

import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-shared", "-fPIC", "-w")


class Unavailable(Exception):
    """Why a kernel cannot be had on this machine, in a line."""


@functools.cache
def missing(name, without):
    """None where the operators of <name>.cpp are loaded, else why they cannot be: a line.

    without: what is the case then, for the log, where it is said once.
    """
    try:
        torch.ops.load_library(str(build(name)))
    except (Unavailable, OSError) as error:
        reason = str(error).splitlines()[0]
        logging.getLogger(__name__).warning("no compiled %s, so %s: %s", name, without, reason)
        return reason
    return None


def build(name) -> Path:
    """Compiles <name>.cpp, up to half a minute once, and returns the library. Raises Unavailable.

    Not by torch.utils.cpp_extension.load: it waits for ever for a build that was killed. Two processes that both find no
    library both build one, and the second replaces the first's by the same.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    written = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    kind = "\n".join([*_FLAGS, torch.__version__, platform.machine(), _features()]).encode()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncrec"
    library = home / f"{name}-{hashlib.sha256(written + kind).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise Unavailable("there is no C++ compiler (c++, g++ or $CXX)")
    partial = library.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, *_FLAGS, str(source), "-o", str(partial)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    try:
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{compiler} cannot build it in {home}: {error.strerror}") from None
    if done.returncode:
        partial.unlink(missing_ok=True)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Unavailable(f"{compiler} cannot build {source.name}: {errors[0]}")
    partial.replace(library)
    return library


def _features():
    """What the processor can do: a library built on one machine may stop another's process."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.M) if info.is_file() else None
    return found.group() if found else platform.processor()
