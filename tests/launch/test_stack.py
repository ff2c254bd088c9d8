import re
import runpy
from pathlib import Path

import pytest
import setuptools

from launch import stack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packages(monkeypatch):
    """What is installed, as a test says."""
    found = {}
    monkeypatch.setattr(stack, "installed", found.get)
    return found


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
    packages.update(zip(("torch", "torchrec", fbgemm), stack.MATCHING[minor], strict=True))
    stack.check_stack()


def test_patch_releases_fit_and_newer_torch_is_left_to_its_imports(packages):
    torch, torchrec, fbgemm = (re.sub(r"\d+$", "9", version) for version in stack.MATCHING[stack.PINNED])
    packages.update({"torch": torch, "torchrec": torchrec, "fbgemm-gpu": fbgemm})
    stack.check_stack()
    packages.update({"torch": "9.0.0", "torchrec": "8.0.0", "fbgemm-gpu": "7.0.0"})
    stack.check_stack()


@pytest.mark.parametrize("missing", ["torch", "torchrec", "fbgemm-gpu"])
def test_a_missing_package_is_named(packages, capsys, missing):
    packages.update(zip(("torch", "torchrec", "fbgemm-gpu"), stack.MATCHING[stack.PINNED], strict=True))
    del packages[missing]
    message = refusal(capsys)
    assert "is missing" in message and re.search(rf"{missing}(\(-cpu\))? None", message)


@pytest.mark.parametrize("package", ["torchrec", "fbgemm-gpu-cpu"])
def test_a_triple_that_does_not_fit_says_what_is_needed(packages, capsys, package):
    torch, torchrec, fbgemm = stack.MATCHING["2.13"]
    packages.update({"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": fbgemm})
    packages[package] = "1.7.3"
    message = refusal(capsys)
    assert "do not fit together" in message and f"{package.removesuffix('-cpu')}" in message and "1.7.3" in message
    assert f"torch {torch} needs torchrec {torchrec} and fbgemm {fbgemm}" in message


def test_both_builds_of_fbgemm_are_refused(packages, capsys):
    torch, torchrec, fbgemm = stack.MATCHING[stack.PINNED]
    packages.update({"torch": torch, "torchrec": torchrec, "fbgemm-gpu": fbgemm, "fbgemm-gpu-cpu": fbgemm})
    assert "fbgemm-gpu and fbgemm-gpu-cpu are both installed" in refusal(capsys)


def test_what_is_installed_here_fits():
    stack.check_stack()
    assert stack.installed("torch") and "+" not in stack.installed("torch")
    assert stack.installed("surely-no-such-package") is None


@pytest.fixture
def installs(monkeypatch, packages):
    """The pip commands of an installation, none of which is run."""
    commands = []
    monkeypatch.setattr(stack, "_pip", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(stack.subprocess, "run", lambda command, check: commands.append(tuple(command[1:])))
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return commands


@pytest.mark.parametrize(("cuda", "fbgemm"), [(True, "fbgemm-gpu"), (False, "fbgemm-gpu-cpu")])
def test_a_bare_machine_gets_the_pinned_triple(installs, monkeypatch, cuda, fbgemm):
    monkeypatch.setattr(stack, "has_cuda", lambda: cuda)
    stack.install()
    torch, torchrec, version = stack.MATCHING[stack.PINNED]
    kernels = [] if cuda else [installs.pop(), installs.pop()]
    *packages, project, check = installs
    assert packages == [
        ("install", f"torch=={torch}"),
        ("install", f"{fbgemm}=={version}"),
        ("install", "--no-deps", f"torchrec=={torchrec}"),  # with them it would bring the other build of FBGEMM
    ]
    assert project == ("install", "--editable", f"{ROOT}[test]") and check[1] == "check"
    for (_, program), name in zip(kernels, ("scan", "block"), strict=not cuda):
        assert "kernels.build" in program and f"build({name!r})" in program


def test_a_known_torch_is_kept_and_the_wrong_fbgemm_goes_first(installs, packages, monkeypatch):
    monkeypatch.setattr(stack, "has_cuda", lambda: False)
    packages.update({"torch": "2.11.5", "fbgemm-gpu": "1.8.0"})
    stack.install()
    _, torchrec, fbgemm = stack.MATCHING["2.11"]
    assert installs[:2] == [("uninstall", "--yes", "fbgemm-gpu"), ("install", f"fbgemm-gpu-cpu=={fbgemm}")]
    assert installs[2] == ("install", "--no-deps", f"torchrec=={torchrec}")
    assert not any(word.startswith("torch==") for command in installs for word in command)


def test_an_index_is_asked_for_torch_alone(installs, monkeypatch):
    monkeypatch.setattr(stack, "has_cuda", lambda: False)
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/cpu")
    stack.install()
    with_index = [command for command in installs if "--index-url" in command]
    assert with_index == [("install", f"torch=={stack.MATCHING[stack.PINNED][0]}", "--index-url", "https://example.org/cpu")]


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
    assert {"trainer", "trainer.data", "syncrec", "embeddings", "kernels", "launch"} <= set(metadata["packages"])
    assert not any(package.startswith(("tests", "benchmarks")) for package in metadata["packages"])
    data = {path for folder, kinds in metadata["package_data"].items() for kind in kinds for path in (ROOT / folder).glob(kind)}
    assert {ROOT / "launch/configs/default.yaml", ROOT / "kernels/scan.cpp", ROOT / "kernels/products.h"} <= data


def test_pip_asks_for_what_the_table_says(metadata):
    torch, torchrec, fbgemm = stack.MATCHING[stack.PINNED]
    assert metadata["extras_require"]["cuda"] == [f"torch=={torch}", f"torchrec=={torchrec}", f"fbgemm-gpu=={fbgemm}"]
    assert f"torch>={min(stack.MATCHING)}" in metadata["install_requires"]
    assert not any(package.startswith(("torchrec", "fbgemm")) for package in metadata["install_requires"])


VERSION = re.compile(r"\b(torch|torchrec|fbgemm[\w-]*)\b[\s\"'`,:(=<>~!]{0,6}v?\d+\.\d+", re.IGNORECASE)


def stated(text):
    return [line for line in text.splitlines() if VERSION.search(line)]


def test_versions_of_the_stack_are_stated_in_one_place():
    told = {"CHANGELOG.md", "docs", "benchmarks", "tests"}  # what was measured with which versions is no second statement
    found = {}
    for top in ROOT.iterdir():
        if (top.name.startswith(".") and top.name != ".ci") or top.name in told or top.suffix == ".egg-info":
            continue
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".txt", ".sh", ""} and path.is_file():
                found[str(path.relative_to(ROOT))] = stated(path.read_text(encoding="utf-8", errors="replace"))
    assert "setup.py" in found and "Makefile" in found and ".ci/run" in found
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line", ["torchrec>=1.6.1", "pip install torch==2.13.0", '"fbgemm-gpu-cpu": "1.8.0"', "needs TorchRec 1.8", "torch v2.11"]
)
def test_a_stated_version_is_seen(line):
    assert stated(line) and not stated("torchmetrics==1.0.3")
