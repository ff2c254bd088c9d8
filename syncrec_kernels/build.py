"""Just-in-time compilation of the C++ kernels beside this file.

Each is compiled where it is first needed, for this machine's processor, and kept in a cache.
PyTorch's operations pass every intermediate tensor through memory; a kernel keeps it in registers
and caches. What a kernel does can also be done without it, more slowly: whoever uses one asks
`missing` first.
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
    # A kernel that is not for this processor says so in its first line (#error), in every process
    # anew: what comes after that is not read, which would take seconds.
    "-Wfatal-errors",
)
_LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch")


class Unavailable(Exception):
    """Why a kernel cannot be had on this machine, in a line.

    There is no compiler, or it fails, or no folder can be written.
    """


@functools.cache
def why_unavailable(name: str, without: str) -> str | None:
    """None where the operators of <name>.cpp are loaded, else why they cannot be: a line.

    without: what is the case then. The log says it, once.
    """
    try:
        library = build(name)
        torch.ops.load_library(str(library))
    except (Unavailable, OSError) as error:
        reason = str(error).splitlines()[0]
        logging.getLogger(__name__).warning(
            "no compiled %s, so %s: %s", name, without, reason
        )
        return reason
    return None


def build(name: str) -> Path:
    """Compiles <name>.cpp, up to half a minute once, and returns the library. Raises Unavailable.

    Not by torch.utils.cpp_extension.load: it waits for ever for a build that was killed. Two
    processes that both see no library both build one, and the second replaces the first's by the
    same. Where the cache folder cannot be written, the library lies in a folder of this user's
    among the machine's temporary files.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    file_name = f"{name}-{_fingerprint(source)}.so"
    cache = _cache_folder()
    library = cache / file_name
    if library.exists():
        return library
    if not _is_writable(cache):
        library = _temporary_folder() / file_name
        if library.exists():
            return library
    compiler = _find_compiler()
    try:
        _compile_in_place(compiler, source, library)
    except OSError as error:
        raise Unavailable(
            f"{compiler} cannot build it in {library.parent}: {error.strerror}"
        ) from None
    return library


def _fingerprint(source: Path) -> str:
    """A hash of all that a library depends on.

    That is the source and the headers, the compiler's flags, PyTorch, and the processor. A library
    of another fingerprint has another name.
    """
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        digest.update(header.read_bytes())
    machine = platform.machine()
    settings = [*_FLAGS, torch.__version__, machine, _processor_features()]
    text = "\n".join(settings)
    digest.update(text.encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    """Where libraries are kept: `syncrec` in the user's cache (XDG_CACHE_HOME, or ~/.cache)."""
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches:
        return Path(caches) / "syncrec"
    return Path.home() / ".cache" / "syncrec"


def _find_compiler() -> str:
    """The C++ compiler. Raises Unavailable where there is none."""
    compiler = (
        os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    )
    if not compiler:
        raise Unavailable("there is no C++ compiler (c++, g++ or $CXX)")
    return compiler


def _compile_in_place(compiler: str, source: Path, library: Path) -> None:
    """Compiles under a temporary name, and moves the library to its own: whole or not at all.

    Raises Unavailable or OSError.
    """
    # A name of its own: in a home that several hosts or containers share, a process number is
    # not this process's alone.
    handle, partial = tempfile.mkstemp(
        ".partial", f"{source.stem}-", library.parent
    )
    os.close(handle)
    try:
        _compile(compiler, source, partial)
        os.chmod(partial, 0o755)
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _compile(compiler: str, source: Path, output: str) -> None:
    """Writes a library into the file `output`. Raises Unavailable."""
    command = [compiler, *_FLAGS, str(source), "-o", output]
    for folder in cpp_extension.include_paths():
        command.append(f"-I{folder}")
    for folder in cpp_extension.library_paths():
        command.append(f"-L{folder}")
    command += _LIBRARIES
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        reason = _first_error(done.stderr)
        raise Unavailable(f"{compiler} cannot build {source.name}: {reason}")


def _first_error(output: str) -> str:
    """The first line of a compiler's output that speaks of an error, else its first line."""
    lines = output.splitlines()
    for line in lines:
        if "error" in line:
            return line
    if lines:
        return lines[0]
    return "?"


def _is_writable(folder: Path) -> bool:
    """Whether the folder is there, made if need be, and takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary_folder() -> Path:
    """A folder for temporary files in which nobody else can put a library. Raises Unavailable."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"syncrec-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise Unavailable(
            f"{folder} cannot be written: {error.strerror}"
        ) from None
    is_folder = stat.S_ISDIR(status.st_mode)
    others_may_write = status.st_mode & 0o022
    if not is_folder or status.st_uid != user or others_may_write:
        raise Unavailable(
            f"{folder} is another user's, or others may write in it: remove it, or set "
            "XDG_CACHE_HOME"
        )
    return folder


def _processor_features() -> str:
    """What the processor can do: a library built on one machine may stop another's process."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        features = re.search(
            r"^(flags|Features)\s*:.*$", info.read_text(encoding="utf-8"), re.M
        )
        if features is not None:
            return features.group()
    return platform.processor()
