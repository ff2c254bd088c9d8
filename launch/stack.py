"""The one place that says which torch, TorchRec and FBGEMM go together, and installs them.

    python launch/stack.py install     into this Python's environment: torch, FBGEMM, TorchRec, the project
                        … --cuda       with torch and FBGEMM for CUDA, also where no driver answers
                        … --cpu        with FBGEMM for CPU, also beside a device
    syncrec stack install              the same, of an installed package
    python launch/stack.py torch       torch alone, for what is measured beside the project
    python launch/stack.py check       says whether what is installed fits together, and this machine

It needs nothing but Python. A pair that does not match fails at import. `fbgemm-gpu` and
`fbgemm-gpu-cpu` install the same module, and TorchRec asks for the first. Its build for CUDA loads
only where there is an NVIDIA driver (it needs libnvidia-ml.so.1), and its build for CPU has no CUDA
kernels. So FBGEMM is chosen here, and TorchRec comes without what it asks for (setup.py lists its
other needs).

Where no NVIDIA driver answers, torch comes for CPU: it is a tenth of the size. FBGEMM follows torch: a
torch whose version says +cpu or +cu130 decides. PyPI's torch, whose version says neither, is a CUDA
build and works on CPU machines too: there the driver decides. On a login node without a driver say
`install --cuda`. TORCH_INDEX_URL names the index that torch comes from, and with it FBGEMM's build for
CUDA.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# torch's minor version: (torch, torchrec, fbgemm-gpu or fbgemm-gpu-cpu). The last is installed where no torch is.
MATCHING = {
    "2.11": ("2.11.0", "1.6.1", "1.6.0"),
    "2.12": ("2.12.0", "1.7.0", "1.7.0"),
    "2.13": ("2.13.0", "1.8.0", "1.8.0"),
}
PINNED = "2.13"


_ROOT = Path(__file__).resolve().parent.parent
# A wheel has no setup.py beside its packages.
_IS_CHECKOUT = (_ROOT / "setup.py").is_file()
_INSTALL = (
    "python launch/stack.py install"
    if _IS_CHECKOUT
    else "syncrec stack install"
)
_PROJECT = "syncrec-trainer"
# What is installed here: setup.py says what it has.
_EXTRA = "train"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def torch_bounds() -> str:
    """The versions of torch that are known here, as pip takes them: ">=2.11,<2.14"."""
    minors = []
    for version in MATCHING:
        major, minor = version.split(".")
        minors.append((int(major), int(minor)))
    newest_major, newest_minor = max(minors)
    least = ".".join(map(str, min(minors)))
    return f">={least},<{newest_major}.{newest_minor + 1}"


def installed(package: str) -> str | None:
    """The installed version without its local part (+cpu, +cu130), or None."""
    version = _version(package)
    return version and version.split("+")[0]


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch is built for ("13.0"), read without importing it.

    None where it is built for none, or is missing.
    """
    text = _file_of("torch", "torch/version.py") or ""
    line = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
    return ast.literal_eval(line[1]) if line else None


def fbgemm_is_cuda() -> bool | None:
    """True where the installed FBGEMM says that it is built for CUDA; None where it does not say."""
    for package in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        text = _file_of(package, "fbgemm_gpu/docs/target.default.json.py")
        if text is not None:
            try:
                return json.loads(text).get("variant") == "cuda"
            except ValueError:
                return None
    return None


def has_driver() -> bool:
    """True where an NVIDIA driver answers."""
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run("nvidia-smi", capture_output=True).returncode == 0
    )


def sees_device(dev: Path = Path("/dev")) -> bool:
    """True where a run would take a CUDA device (trainer.distributed.process_group). Starts nothing.

    dev: where its file is; CUDA_VISIBLE_DEVICES may hide it.
    """
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return False
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    # CUDA stops at the first that it does not know: "", -1, Slurm's NoDevFiles.
    if not re.match(r"\d|GPU-|MIG-", first):
        return False
    return any(
        re.fullmatch(r"nvidia\d+|dxg", file.name) for file in dev.iterdir()
    )


def check_stack(device: str = "auto") -> None:
    """Leaves with one line and status 2 where what is installed does not fit.

    torch, TorchRec and FBGEMM have to fit together, and to the device that is to compute: "cpu",
    "cuda", or "auto", this machine's.
    """
    torch, torchrec = installed("torch"), installed("torchrec")
    fbgemm = installed("fbgemm-gpu-cpu") or installed("fbgemm-gpu")
    versions = f"torch {torch}, torchrec {torchrec}, fbgemm-gpu(-cpu) {fbgemm}"
    way_out = f"install the matching ones with `{_INSTALL}`"
    if not (torch and torchrec and fbgemm):
        sys.exit(_refuse(f"{versions}: one of them is missing; {way_out}"))
    if installed("fbgemm-gpu-cpu") and installed("fbgemm-gpu"):
        sys.exit(
            _refuse(
                f"fbgemm-gpu and fbgemm-gpu-cpu are both installed, one over the other; {way_out}"
            )
        )
    wanted = MATCHING.get(_minor(torch))
    # A newer torch than we know may be fine: its imports will tell.
    if wanted and (_minor(torchrec), _minor(fbgemm)) != (
        _minor(wanted[1]),
        _minor(wanted[2]),
    ):
        needs = (
            f"torch {torch} needs torchrec {wanted[1]} and fbgemm {wanted[2]}"
        )
        sys.exit(_refuse(f"{versions} do not fit together: {needs}; {way_out}"))
    takes_cuda = device != "cpu" and sees_device()
    refusal = _device_refusal(torch_cuda(), fbgemm_is_cuda(), takes_cuda)
    if refusal:
        sys.exit(_refuse(refusal))


def _device_refusal(cuda, fbgemm_cuda, takes_cuda):
    """Why torch and FBGEMM are not built for the same device, or None.

    A torch for CUDA runs on a CPU machine too. takes_cuda: whether a run would take a device.
    """
    if fbgemm_cuda is None:
        return None
    if fbgemm_cuda and cuda is None:
        return (
            "FBGEMM is built for CUDA and torch for CPU alone, beside which it does not load: "
            f"`{_INSTALL} --cpu`, or install a torch for CUDA"
        )
    if not fbgemm_cuda and cuda is not None and takes_cuda:
        return (
            f"this machine has a CUDA device and torch is built for CUDA {cuda}, but FBGEMM for "
            f"CPU alone: `{_INSTALL} --cuda`, or take the CPU with --device cpu"
        )
    return None


def install(device: str | None = None) -> None:
    """Installs the stack into this Python's environment; a torch that is there and known is kept.

    device: "cuda" or "cpu", which FBGEMM is to be built for; None: as torch is.
    """
    if device == "cuda" and installed("torch") and torch_cuda() is None:
        version = _version("torch")
        sys.exit(
            _refuse(
                f"install --cuda: torch {version} is built for CPU alone: pip uninstall torch, then "
                "install again"
            )
        )
    _, torchrec, fbgemm = install_torch(device)
    cuda = wants_cuda(device)
    if cuda:
        wanted = "fbgemm-gpu"
        unwanted = "fbgemm-gpu-cpu"
    else:
        wanted = "fbgemm-gpu-cpu"
        unwanted = "fbgemm-gpu"
    if installed(unwanted):
        _pip("uninstall", "--yes", unwanted)
    elif (
        cuda and installed(wanted) and fbgemm_is_cuda() is False
    ):  # an index of CPU builds calls them fbgemm-gpu too
        _pip("uninstall", "--yes", wanted)
    _pip("install", f"{wanted}=={fbgemm}", *(_index() if cuda else []))
    _pip("install", "--no-deps", f"torchrec=={torchrec}")
    _pip("install", *_project())
    # In processes of their own: this one does not see what has just been installed.
    # Whoever asks for CPU here knows of the device.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    subprocess.run(
        [sys.executable, __file__, "check"], check=True, env=os.environ | hidden
    )
    # Now rather than in the first step; without a compiler there is none, which a run says and does without.
    build = "from syncrec_kernels.build import Unavailable, build\ntry: build({!r})\nexcept Unavailable as reason: print(reason)"
    kernels = ["batch"]  # of the loaders, which run on every host's CPU
    if not cuda:
        kernels += ["block", "scan"]
    for kernel in kernels:
        subprocess.run([sys.executable, "-c", build.format(kernel)], check=True)


def wants_cuda(device: str | None = None) -> bool:
    """Whether FBGEMM is to be built for CUDA, beside the torch that is installed by now.

    device: as for `install`.
    """
    if device is not None:
        return device == "cuda"
    cuda = torch_cuda()
    if cuda is None:
        return False
    if "+cu" in _version("torch"):  # somebody chose it
        return True
    driver = has_driver()
    if not driver:
        print(
            f"torch is built for CUDA {cuda}, and no NVIDIA driver answers here: "
            "FBGEMM comes for CPU. "
            f"For CUDA hosts that share this environment: {_INSTALL} --cuda",
            flush=True,
        )
    return driver


def install_torch(device: str | None = None) -> tuple[str, str, str]:
    """Installs torch, unless one that is known is there; returns its entry of MATCHING.

    device: as for `install`.
    """
    minor = _minor(installed("torch") or "")
    matching = MATCHING.get(minor, MATCHING[PINNED])
    if minor in MATCHING:
        return matching
    requirement = f"torch=={matching[0]}"
    if not _takes_cpu_build(device) or not _install_cpu_build(requirement):
        _pip("install", requirement, *_index())
    importlib.invalidate_caches()  # its version is read by this process
    return matching


def _takes_cpu_build(device: str | None) -> bool:
    """Whether torch comes for CPU: nobody has chosen an index, and nothing here needs CUDA's libraries."""
    if "TORCH_INDEX_URL" in os.environ or sys.platform != "linux":
        return False
    return device == "cpu" or (device is None and not has_driver())


def _install_cpu_build(requirement: str) -> bool:
    """Installs torch from PyTorch's index of builds for CPU; False where that cannot be reached."""
    print(
        "torch comes for CPU, as no NVIDIA driver answers here or --cpu was said. "
        f"For CUDA hosts that share this environment: {_INSTALL} --cuda",
        flush=True,
    )
    try:
        _pip(
            "install",
            "--retries=0",
            "--timeout=15",
            requirement,
            "--index-url",
            _CPU_INDEX,
        )
    except subprocess.CalledProcessError:
        print(
            f"{_CPU_INDEX}: cannot be reached; torch comes from pip's own index, "
            "with CUDA's libraries",
            flush=True,
        )
        return False
    return True


def _project() -> list[str]:
    """What pip installs beside torch, FBGEMM and TorchRec: a checkout itself, or a wheel's needs."""
    if _IS_CHECKOUT:
        extras = _EXTRA
        if (_ROOT / "tests").is_dir():  # an image has none
            extras += ",test"
        return ["--editable", f"{_ROOT}[{extras}]"]
    needs = []
    for line in importlib.metadata.requires(_PROJECT) or ():
        requirement, _, marker = line.partition(";")
        if f'extra == "{_EXTRA}"' in marker.replace("'", '"'):
            needs.append(requirement.strip())
    return needs


def _index():
    # An index of CPU-only builds spares a CPU machine the CUDA libraries, which it would not use; one
    # of CUDA builds has torch and FBGEMM for the same CUDA version.
    index = os.environ.get("TORCH_INDEX_URL")
    return ["--index-url", index] if index else []


def _version(package):
    """The installed version, its local part too, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_of(package, path):
    """The text of an installed package's file, or None."""
    try:
        file = importlib.metadata.distribution(package).locate_file(path)
        return Path(str(file)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _pip(*arguments):
    print("pip " + " ".join(arguments), flush=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]],
        check=True,
    )


def _minor(version):
    return ".".join(version.split(".")[:2])


def _refuse(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(arguments: list[str]) -> None:
    """What the command line asks for."""
    commands: dict[tuple[str, ...], Callable[[], object]] = {
        ("install",): install,
        ("install", "--cuda"): lambda: install("cuda"),
        ("install", "--cpu"): lambda: install("cpu"),
        ("torch",): install_torch,
        ("check",): check_stack,
    }
    command = commands.get(tuple(arguments))
    if command is None:
        sys.exit(
            f"usage: python launch/stack.py {' | '.join(' '.join(words) for words in commands)}"
        )
    command()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
