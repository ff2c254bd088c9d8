"""The one place that says which torch, TorchRec and FBGEMM go together, and installs them. Needs nothing but Python.

    python launch/stack.py install      into the environment of this Python: the wheels for CUDA or for CPU, then the project
    python launch/stack.py torch        torch alone, for what is measured beside the project
    python launch/stack.py check        says whether what is installed fits together

A pair that does not match fails at import. `fbgemm-gpu` and `fbgemm-gpu-cpu` install the same module, and TorchRec asks for
the first: on a CPU machine it would put half a gigabyte that does not load over the build that does. So FBGEMM is chosen
here, and TorchRec comes without what it asks for (setup.py lists its other needs).
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

# torch's minor version: (torch, torchrec, fbgemm-gpu or fbgemm-gpu-cpu). The last is installed where no torch is.
MATCHING = {
    "2.11": ("2.11.0", "1.6.1", "1.6.0"),
    "2.12": ("2.12.0", "1.7.0", "1.7.0"),
    "2.13": ("2.13.0", "1.8.0", "1.8.0"),
}
PINNED = "2.13"


def installed(package):
    """The installed version without its local part (+cpu, +cu130), or None."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def has_cuda():
    """True where an NVIDIA driver answers."""
    return shutil.which("nvidia-smi") is not None and subprocess.run("nvidia-smi", capture_output=True).returncode == 0


def check_stack():
    """Leaves with one line and status 2 where torch, TorchRec and FBGEMM do not fit together."""
    torch, torchrec = installed("torch"), installed("torchrec")
    fbgemm = installed("fbgemm-gpu-cpu") or installed("fbgemm-gpu")
    found = f"torch {torch}, torchrec {torchrec}, fbgemm-gpu(-cpu) {fbgemm}"
    install = "install the matching ones with `python launch/stack.py install`"
    if not (torch and torchrec and fbgemm):
        sys.exit(_refuse(f"{found}: one of them is missing; {install}"))
    if installed("fbgemm-gpu-cpu") and installed("fbgemm-gpu"):
        sys.exit(_refuse(f"fbgemm-gpu and fbgemm-gpu-cpu are both installed, one over the other; {install}"))
    wanted = MATCHING.get(_minor(torch))
    # A newer torch than we know may be fine: its imports will tell.
    if wanted and (_minor(torchrec), _minor(fbgemm)) != (_minor(wanted[1]), _minor(wanted[2])):
        needs = f"torch {torch} needs torchrec {wanted[1]} and fbgemm {wanted[2]}"
        sys.exit(_refuse(f"{found} do not fit together: {needs}; {install}"))


def install():
    """Installs the stack into this Python's environment; a torch that is there and known is kept."""
    _, torchrec, fbgemm = install_torch()
    wanted, unwanted = ("fbgemm-gpu", "fbgemm-gpu-cpu") if has_cuda() else ("fbgemm-gpu-cpu", "fbgemm-gpu")
    if installed(unwanted):
        _pip("uninstall", "--yes", unwanted)
    _pip("install", f"{wanted}=={fbgemm}")
    _pip("install", "--no-deps", f"torchrec=={torchrec}")
    _pip("install", "--editable", f"{Path(__file__).resolve().parent.parent}[test]")
    # In processes of their own: this one does not see what has just been installed.
    subprocess.run([sys.executable, __file__, "check"], check=True)
    if not has_cuda():
        # Now rather than in the first step; without a compiler there is none, which a run says and does without.
        build = "from kernels.build import Unavailable, build\ntry: build({!r})\nexcept Unavailable as reason: print(reason)"
        for kernel in ("block", "scan"):
            subprocess.run([sys.executable, "-c", build.format(kernel)], check=True)


def install_torch():
    """Installs torch, unless one that is known is there; returns its entry of MATCHING."""
    minor = _minor(installed("torch") or "")
    matching = MATCHING.get(minor, MATCHING[PINNED])
    if minor not in MATCHING:
        # TORCH_INDEX_URL: an index of CPU-only builds spares a CPU machine the CUDA libraries, which it would not use.
        index = os.environ.get("TORCH_INDEX_URL")
        _pip("install", f"torch=={matching[0]}", *(["--index-url", index] if index else []))
    return matching


def _pip(*arguments):
    print("pip " + " ".join(arguments), flush=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]], check=True)


def _minor(version):
    return ".".join(version.split(".")[:2])


def _refuse(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    commands = {"install": install, "torch": install_torch, "check": check_stack}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python launch/stack.py {' | '.join(commands)}")
    commands[sys.argv[1]]()
