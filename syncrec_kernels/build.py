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
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-w",
)
# A kernel that is not for this processor says so in its first line (#error), in every process anew:
# what comes after that is not read, which would take seconds.
_FLAGS += ("-Wfatal-errors",)


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
        logging.getLogger(__name__).warning(
            "no compiled %s, so %s: %s", name, without, reason
        )
        return reason
    return None


def build(name) -> Path:
    """Compiles <name>.cpp, up to half a minute once, and returns the library. Raises Unavailable.

    Not by torch.utils.cpp_extension.load: it waits for ever for a build that was killed. Two
    processes that both find no library both build one, and the second replaces the first's by the
    same. Where the cache folder cannot be written, the library lies in a folder of this user's
    among the machine's temporary files."""
    source = Path(__file__).with_name(f"{name}.cpp")
    written = b"".join(
        path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))
    )
    kind = "\n".join(
        [*_FLAGS, torch.__version__, platform.machine(), _features()]
    ).encode()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncrec"
    named = f"{name}-{hashlib.sha256(written + kind).hexdigest()[:16]}.so"
    library = home / named
    if library.exists():
        return library
    if not _writable(home):
        library = _own_folder() / named
        if library.exists():
            return library
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise Unavailable("there is no C++ compiler (c++, g++ or $CXX)")
    try:
        # A name of its own: in a home that several hosts or containers share, a process number is
        # not this process's alone.
        handle, partial = tempfile.mkstemp(".partial", f"{name}-", library.parent)
        os.close(handle)
        try:
            _compile(compiler, source, partial)
            os.chmod(partial, 0o755)
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, library)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise Unavailable(
            f"{compiler} cannot build it in {library.parent}: {error.strerror}"
        ) from None
    return library


def _compile(compiler, source, output):
    """Writes a library into the file `output`. Raises Unavailable."""
    command = [compiler, *_FLAGS, str(source), "-o", output]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + [
        "-lc10",
        "-ltorch_cpu",
        "-ltorch",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = (
            [line for line in done.stderr.splitlines() if "error" in line]
            or done.stderr.splitlines()
            or ["?"]
        )
        raise Unavailable(f"{compiler} cannot build {source.name}: {errors[0]}")


def _writable(folder):
    """Whether the folder is there, made if need be, and takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _own_folder():
    """A folder for temporary files in which nobody else can put a library. Raises Unavailable."""
    folder = Path(tempfile.gettempdir()) / f"syncrec-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror}") from None
    if (
        not stat.S_ISDIR(facts.st_mode)
        or facts.st_uid != os.getuid()
        or facts.st_mode & 0o022
    ):
        raise Unavailable(
            f"{folder} is another user's, or others may write in it: remove it, or set XDG_CACHE_HOME"
        )
    return folder


def _features():
    """What the processor can do: a library built on one machine may stop another's process."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.M)
        if info.is_file()
        else None
    )
    return found.group() if found else platform.processor()
