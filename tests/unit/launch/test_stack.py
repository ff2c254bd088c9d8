import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from launch import stack
from trainer.reporting.html import LIBRARY

ROOT = Path(__file__).parents[3]


class Machine:
    """What is installed, with local versions, and what the machine has, as a test says."""

    def __init__(self):
        self.packages = {}
        self.cuda = None  # what torch is built for
        self.fbgemm = None  # what FBGEMM says of itself
        self.device = self.driver = False

    def file_of(self, package, path):
        if package not in self.packages:
            return None
        if path == "torch/version.py":
            return f"__version__ = '2.0'\ncuda: Optional[str] = {self.cuda!r}\nhip: Optional[str] = None\n"
        assert path == "fbgemm_gpu/docs/target.default.json.py"
        return (
            self.fbgemm
            and f'\n{{"version": "1", "target": "default", "variant": "{self.fbgemm}"}}\n'
        )


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(stack, "_version", made.packages.get)
    monkeypatch.setattr(stack, "_file_of", made.file_of)
    monkeypatch.setattr(stack, "sees_device", lambda: made.device)
    monkeypatch.setattr(stack, "has_driver", lambda: made.driver)
    return made


@pytest.fixture
def packages(machine):
    return machine.packages


def refusal(capsys):
    with pytest.raises(SystemExit) as left:
        stack.check_stack()
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "python launch/stack.py install" in message
    return message


@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
@pytest.mark.parametrize("minor", stack.MATCHING)
def test_every_known_triple_fits(packages, minor, fbgemm):
    packages.update(
        zip(("torch", "torchrec", fbgemm), stack.MATCHING[minor], strict=True)
    )
    stack.check_stack()


def test_patch_releases_fit_and_newer_torch_is_left_to_its_imports(packages):
    torch, torchrec, fbgemm = (
        re.sub(r"\d+$", "9", version)
        for version in stack.MATCHING[stack.PINNED]
    )
    packages.update(
        {"torch": torch, "torchrec": torchrec, "fbgemm-gpu": fbgemm}
    )
    stack.check_stack()
    packages.update(
        {"torch": "9.0.0", "torchrec": "8.0.0", "fbgemm-gpu": "7.0.0"}
    )
    stack.check_stack()


@pytest.mark.parametrize("missing", ["torch", "torchrec", "fbgemm-gpu"])
def test_a_missing_package_is_named(packages, capsys, missing):
    packages.update(
        zip(
            ("torch", "torchrec", "fbgemm-gpu"),
            stack.MATCHING[stack.PINNED],
            strict=True,
        )
    )
    del packages[missing]
    message = refusal(capsys)
    assert "is missing" in message and re.search(
        rf"{missing}(\(-cpu\))? None", message
    )


@pytest.mark.parametrize("package", ["torchrec", "fbgemm-gpu-cpu"])
def test_a_triple_that_does_not_fit_says_what_is_needed(
    packages, capsys, package
):
    torch, torchrec, fbgemm = stack.MATCHING["2.13"]
    packages.update(
        {"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": fbgemm}
    )
    packages[package] = "1.7.3"
    message = refusal(capsys)
    assert (
        "do not fit together" in message
        and f"{package.removesuffix('-cpu')}" in message
        and "1.7.3" in message
    )
    assert (
        f"torch {torch} needs torchrec {torchrec} and fbgemm {fbgemm}"
        in message
    )


def test_both_builds_of_fbgemm_are_refused(packages, capsys):
    torch, torchrec, fbgemm = stack.MATCHING[stack.PINNED]
    packages.update(
        {
            "torch": torch,
            "torchrec": torchrec,
            "fbgemm-gpu": fbgemm,
            "fbgemm-gpu-cpu": fbgemm,
        }
    )
    assert "fbgemm-gpu and fbgemm-gpu-cpu are both installed" in refusal(capsys)


DEVICES = {
    # torch's CUDA, FBGEMM's variant, is there a device: what the refusal says
    "CPU": (None, "cpu", False, None),
    "CUDA": ("13.0", "cuda", True, None),
    "CUDA on a login node": ("13.0", "cuda", False, None),
    "PyPI's torch on a CPU machine": ("13.0", "cpu", False, None),
    "torch for CPU on a CUDA machine": (None, "cpu", True, None),
    "made on a login node": (
        "13.0",
        "cpu",
        True,
        "has a CUDA device and torch is built for CUDA 13.0, but FBGEMM for CPU",
    ),
    "FBGEMM as TorchRec asks for it": (
        None,
        "cuda",
        False,
        "FBGEMM is built for CUDA and torch for CPU alone",
    ),
    "the same on a CUDA machine": (
        None,
        "cuda",
        True,
        "FBGEMM is built for CUDA and torch for CPU alone",
    ),
    "an FBGEMM that does not say": ("13.0", None, True, None),
}
WAYS_OUT = {
    "made on a login node": "install --cuda`",
    "FBGEMM as TorchRec asks for it": "install --cpu`",
}


@pytest.mark.parametrize("case", DEVICES)
@pytest.mark.parametrize("package", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
def test_torch_and_fbgemm_are_for_the_device_that_is_there(
    machine, capsys, case, package
):
    """FBGEMM's own word counts: an index of CPU builds calls them fbgemm-gpu too."""
    machine.packages.update(
        zip(
            ("torch", "torchrec", package),
            stack.MATCHING[stack.PINNED],
            strict=True,
        )
    )
    machine.cuda, machine.fbgemm, machine.device, refused = DEVICES[case]
    if refused is None:
        stack.check_stack()
    else:
        message = refusal(capsys)
        assert refused in message and WAYS_OUT.get(case, "") in message


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [
        (["nvidia0"], None, True),
        (["nvidia3", "nvidiactl"], "0,1", True),
        (["nvidia0"], "GPU-8932f937", True),
        (["dxg"], None, True),  # Windows' own Linux
        (["nvidia0"], "", False),
        (["nvidia0"], "-1", False),
        (["nvidia0"], "NoDevFiles", False),  # as Slurm has it
        (
            ["nvidiactl", "nvidia-uvm", "sda"],
            None,
            False,
        ),  # a driver, and no device of ours
        ([], "0", False),
    ],
)
def test_a_device_is_seen_by_its_file_unless_it_is_hidden(
    tmp_path, monkeypatch, files, visible, expected
):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert stack.sees_device(tmp_path) == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert stack.sees_device(tmp_path) == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not stack.sees_device(tmp_path)


@pytest.mark.ranks
def test_checking_imports_no_torch_and_starts_nothing(machine, monkeypatch):
    """It is the first line of every script."""
    machine.packages.update(
        zip(
            ("torch", "torchrec", "fbgemm-gpu"),
            stack.MATCHING[stack.PINNED],
            strict=True,
        )
    )
    machine.cuda, machine.fbgemm = "13.0", "cuda"
    monkeypatch.setattr(stack.subprocess, "run", pytest.fail)
    stack.check_stack()
    program = "import sys; from launch import stack; stack.check_stack(); sys.exit('torch' in sys.modules)"
    monkeypatch.undo()
    assert (
        stack.subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT
        ).returncode
        == 0
    )


@pytest.mark.ranks
def test_every_command_gets_as_far_as_the_check_without_the_stack():
    """As pip installs the package: without PyTorch, which the check then asks for."""
    program = (
        "import importlib, sys; from launch.cli import COMMANDS\n"
        "for name in ('torch', 'deepspeed', 'torchrec'): sys.modules[name] = None\n"
        "for name in COMMANDS: importlib.import_module(f'launch.{name}')"
    )
    done = stack.subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_installed_here_fits():
    import torch

    stack.check_stack()
    assert stack.torch_cuda() == torch.version.cuda
    assert stack.fbgemm_is_cuda() == (stack.installed("fbgemm-gpu-cpu") is None)
    assert stack.installed("torch") and "+" not in stack.installed("torch")
    assert stack.installed("surely-no-such-package") is None


@pytest.fixture
def installs(monkeypatch, machine):
    """The pip commands of an installation, none of which is run; torch alone is there afterwards, PyPI's or the index's."""
    commands = []

    def pip(*arguments):
        commands.append(arguments)
        torch = [
            word.removeprefix("torch==")
            for word in arguments
            if word.startswith("torch==")
        ]
        if torch:
            build = (
                arguments[-1].rpartition("/")[2]
                if "--index-url" in arguments
                else ""
            )
            machine.packages["torch"] = (
                f"{torch[0]}+{build}" if build else torch[0]
            )
            machine.cuda = None if build == "cpu" else "13.0"

    monkeypatch.setattr(stack, "_pip", pip)
    monkeypatch.setattr(
        stack.subprocess,
        "run",
        lambda command, check, **_: commands.append(tuple(command[1:])),
    )
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return commands


def fbgemm_in(commands):
    (command,) = [
        command
        for command in commands
        if command[0] == "install" and command[1].startswith("fbgemm")
    ]
    return command


INDEX = "https://example.org/"
BUILDS = {
    # torch that is there (version, its CUDA), the index, a driver, what is asked for: is FBGEMM for CUDA?
    "a bare CPU machine": (None, None, None, False, None, False),
    "a bare CUDA machine": (None, None, None, True, None, True),
    "a bare login node": (None, None, None, False, "cuda", True),
    "a login node and an index": (None, None, "cu130", False, None, True),
    "an index of CPU builds": (None, None, "cpu", False, None, False),
    "an index of CPU builds on a CUDA machine": (
        None,
        None,
        "cpu",
        True,
        None,
        False,
    ),
    "a chosen CUDA torch on a login node": (
        "2.11.0+cu130",
        "13.0",
        None,
        False,
        None,
        True,
    ),
    "a torch for CPU on a CUDA machine": (
        "2.13.0+cpu",
        None,
        None,
        True,
        None,
        False,
    ),
    "a torch of one's own for CPU": ("2.13.0", None, None, True, None, False),
    "PyPI's torch on a CPU machine": (
        "2.12.1",
        "13.0",
        None,
        False,
        None,
        False,
    ),
    "PyPI's torch on a CUDA machine": (
        "2.12.1",
        "13.0",
        None,
        True,
        None,
        True,
    ),
    "PyPI's torch on a login node": (
        "2.12.1",
        "13.0",
        None,
        False,
        "cuda",
        True,
    ),
    "CPU asked for": ("2.13.0+cu130", "13.0", None, True, "cpu", False),
}


@pytest.mark.parametrize("case", BUILDS)
def test_fbgemm_is_built_for_what_torch_is(
    installs, machine, monkeypatch, case
):
    version, machine.cuda, index, machine.driver, asked, expected = BUILDS[case]
    if version:
        machine.packages["torch"] = version
    if index:
        monkeypatch.setenv("TORCH_INDEX_URL", INDEX + index)
    stack.main(["install", *([f"--{asked}"] if asked else [])])
    package, *source = fbgemm_in(installs)[1:]
    minor = ".".join((version or stack.PINNED).split(".")[:2])
    assert (
        package
        == f"{'fbgemm-gpu' if expected else 'fbgemm-gpu-cpu'}=={stack.MATCHING[minor][2]}"
    )
    assert source == (
        ["--index-url", INDEX + index] if expected and index else []
    )
    assert any(
        "build('block')" in word for command in installs for word in command
    ) == (not expected)


def test_a_cpu_machine_is_told_of_the_hosts_that_may_share_its_environment(
    installs, machine, capsys
):
    stack.install()
    assert (
        "torch comes for CPU, as no NVIDIA driver answers here"
        in (said := capsys.readouterr().out)
        and "--cuda" in said
    )


def test_a_torch_for_cpu_cannot_have_fbgemm_for_cuda(installs, machine, capsys):
    machine.packages["torch"] = "2.13.0+cpu"
    with pytest.raises(SystemExit) as left:
        stack.main(["install", "--cuda"])
    assert left.value.code == 2 and installs == []
    assert re.fullmatch(
        r"error: install --cuda: torch 2\.13\.0\+cpu is .*pip uninstall torch.*\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    "arguments",
    ["", "instal", "install --gpu", "check --cuda", "install --cuda --cpu"],
)
def test_another_command_line_is_told_the_usage(installs, arguments):
    with pytest.raises(SystemExit, match=r"^usage: .*install --cuda"):
        stack.main(arguments.split())
    assert installs == []


@pytest.mark.parametrize(
    ("cuda", "fbgemm"), [(True, "fbgemm-gpu"), (False, "fbgemm-gpu-cpu")]
)
def test_a_bare_machine_gets_the_pinned_triple(installs, machine, cuda, fbgemm):
    machine.driver = cuda
    stack.install()
    torch, torchrec, version = stack.MATCHING[stack.PINNED]
    # Loaders run on the CPU of any host.
    kernels = ("batch",) if cuda else ("batch", "block", "scan")
    built = installs[-len(kernels) :]
    *packages, project, check = installs[: -len(kernels)]
    source = ["--index-url", stack._CPU_INDEX]
    if cuda:
        first = ("install", f"torch=={torch}")
    else:
        quick = ("--retries=0", "--timeout=15")
        first = ("install", *quick, f"torch=={torch}", *source)
    assert packages == [
        first,
        ("install", f"{fbgemm}=={version}"),
        (
            "install",
            "--no-deps",
            f"torchrec=={torchrec}",
        ),  # with them it would bring the other build of FBGEMM
    ]
    assert (
        project == ("install", "--editable", f"{ROOT}[train,test]")
        and check[1] == "check"
    )
    for (_, program), name in zip(built, kernels, strict=True):
        assert (
            "syncrec_kernels.build" in program and f"build({name!r})" in program
        )


def test_a_known_torch_is_kept_and_the_wrong_fbgemm_goes_first(
    installs, packages
):
    packages.update({"torch": "2.11.5", "fbgemm-gpu": "1.8.0"})
    stack.install()
    _, torchrec, fbgemm = stack.MATCHING["2.11"]
    assert installs[:2] == [
        ("uninstall", "--yes", "fbgemm-gpu"),
        ("install", f"fbgemm-gpu-cpu=={fbgemm}"),
    ]
    assert installs[2] == ("install", "--no-deps", f"torchrec=={torchrec}")
    assert not any(
        word.startswith("torch==") for command in installs for word in command
    )


def test_a_cpu_build_that_is_called_fbgemm_gpu_goes_first_too(
    installs, machine
):
    machine.packages.update(
        {"torch": "2.13.0+cu130", "fbgemm-gpu": "1.8.0+cpu"}
    )
    machine.cuda, machine.fbgemm = "13.0", "cpu"
    stack.install()
    assert installs[:2] == [
        ("uninstall", "--yes", "fbgemm-gpu"),
        ("install", f"fbgemm-gpu=={stack.MATCHING['2.13'][2]}"),
    ]


def test_an_index_of_cpu_builds_is_asked_for_torch_alone(installs, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/cpu")
    stack.install()
    with_index = [command for command in installs if "--index-url" in command]
    assert with_index == [
        (
            "install",
            f"torch=={stack.MATCHING[stack.PINNED][0]}",
            "--index-url",
            "https://example.org/cpu",
        )
    ]


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py tells setuptools."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_the_package_has_its_name_and_all_folders(metadata):
    assert metadata["name"] == "syncrec-trainer"
    assert {
        "trainer",
        "trainer.data",
        "syncrec",
        "embeddings",
        "syncrec_kernels",
        "launch",
    } <= set(metadata["packages"])
    assert not any(
        package.startswith(("tests", "benchmarks"))
        for package in metadata["packages"]
    )
    data = {
        path
        for folder, kinds in metadata["package_data"].items()
        for kind in kinds
        for path in (ROOT / folder.replace(".", "/")).glob(kind)
    }
    assert {
        ROOT / "launch/configs/default.yaml",
        ROOT / "syncrec_kernels/scan.cpp",
        ROOT / "syncrec_kernels/products.h",
        LIBRARY,
        *LIBRARY.parent.glob("*.jinja"),
        *LIBRARY.parent.glob("page.*"),
    } <= data


def test_pip_asks_for_what_the_table_says(metadata):
    torch, torchrec, fbgemm = stack.MATCHING[stack.PINNED]
    extras = metadata["extras_require"]
    exact = [
        f"torch=={torch}",
        f"torchrec=={torchrec}",
        f"fbgemm-gpu=={fbgemm}",
    ]
    assert extras["cuda"] == [*extras["train"], *exact]
    bounds = f"torch{stack.torch_bounds()}"
    assert bounds in extras["train"]
    allowed = Requirement(bounds).specifier
    for known in stack.MATCHING.values():
        assert known[0] in allowed
    newest = max(int(minor.split(".")[1]) for minor in stack.MATCHING)
    assert f"2.{newest + 1}.0" not in allowed


def test_pip_alone_brings_no_torch(metadata):
    """It would bring CUDA's libraries to every machine, and an FBGEMM that does not load."""
    heavy = ("torch", "deepspeed", "fbgemm", "tensordict")
    for requirement in metadata["install_requires"]:
        assert not requirement.startswith(heavy)
    assert "deepspeed>=0.19" in metadata["extras_require"]["train"]


def test_an_installed_package_says_a_command_that_it_has(
    installs, packages, monkeypatch, capsys, tmp_path
):
    """No file of a checkout, which it has not."""
    installed = tmp_path / "launch" / "stack.py"
    installed.parent.mkdir()
    installed.write_bytes(Path(stack.__file__).read_bytes())
    names = runpy.run_path(str(installed))
    assert names["_INSTALL"] == "syncrec stack install"
    with pytest.raises(SystemExit) as left:
        names["check_stack"].__globals__["_version"] = packages.get
        names["check_stack"]()
    assert left.value.code == 2
    assert "`syncrec stack install`" in capsys.readouterr().err
    monkeypatch.setattr(stack, "_IS_CHECKOUT", False)
    needs = ["numpy>=2.0", 'torch>=2; extra == "train"', "x; extra == 'train'"]
    monkeypatch.setattr(
        stack.importlib.metadata, "requires", lambda name: needs
    )
    stack.install()
    assert ("install", "torch>=2", "x") in installs


def test_where_builds_for_cpu_cannot_be_had_pips_own_index_serves(
    installs, monkeypatch, capsys
):
    pip = stack._pip

    def without_pytorchs_index(*arguments):
        if stack._CPU_INDEX in arguments:
            raise stack.subprocess.CalledProcessError(1, "pip")
        pip(*arguments)

    monkeypatch.setattr(stack, "_pip", without_pytorchs_index)
    stack.install()
    torch = stack.MATCHING[stack.PINNED][0]
    assert installs[0] == ("install", f"torch=={torch}")
    assert "cannot be reached" in capsys.readouterr().out


VERSION = re.compile(
    r"\b(torch|torchrec|fbgemm[\w-]*)\b[\s\"'`,:(=<>~!]{0,6}v?\d+\.\d+",
    re.IGNORECASE,
)


def stated(text):
    return [line for line in text.splitlines() if VERSION.search(line)]


def test_versions_of_the_stack_are_stated_in_one_place():
    told = {
        "CHANGELOG.md",
        "docs",
        "benchmarks",
        "tests",
    }  # what was measured with which versions is no second statement
    found = {}
    for top in ROOT.iterdir():
        if (
            (top.name.startswith(".") and top.name != ".ci")
            or top.name in told
            or top.suffix == ".egg-info"
        ):
            continue
        for path in [top] if top.is_file() else top.rglob("*"):
            if (
                path.suffix
                in {
                    ".py",
                    ".md",
                    ".toml",
                    ".yaml",
                    ".yml",
                    ".cfg",
                    ".txt",
                    ".sh",
                    "",
                }
                and path.is_file()
            ):
                found[str(path.relative_to(ROOT))] = stated(
                    path.read_text(encoding="utf-8", errors="replace")
                )
    assert "setup.py" in found and "Makefile" in found and ".ci/run" in found
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torchrec>=1.6.1",
        "pip install torch==2.13.0",
        '"fbgemm-gpu-cpu": "1.8.0"',
        "needs TorchRec 1.8",
        "torch v2.11",
    ],
)
def test_a_stated_version_is_seen(line):
    assert stated(line) and not stated("torchmetrics==1.0.3")


def test_a_checkout_without_tests_installs_nothing_for_them(
    installs, machine, monkeypatch, tmp_path
):
    """An image's."""
    monkeypatch.setattr(stack, "_ROOT", tmp_path)
    stack.install()
    assert ("install", "--editable", f"{tmp_path}[train]") in installs
