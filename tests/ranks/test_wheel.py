"""A wheel in an environment of its own, used from another folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ranks.conftest import MODEL, ROOT, SETTINGS
from trainer import __version__


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder with the programs of an environment that has the stack beside it, and the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
    ]
    wheel = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(wheel, check=True, cwd=folder)
    (file,) = folder.glob("*.whl")
    root = folder / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", root], check=True
    )
    (packages,) = root.glob("lib/python*/site-packages")
    # By the environment's own Python, which the installed program names in its first line.
    into = [*pip, "--python", root / "bin" / "python", "install"]
    alone = {
        name: os.environ[name] for name in os.environ if name != "PYTHONPATH"
    }
    install = [*into, "--no-deps", "--no-index", file]
    subprocess.run(install, check=True, cwd=folder, env=alone)
    # What the wheel needs is in the environment that runs this; the project itself is not.
    stack = folder / "stack"
    stack.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "syncrec" not in path.name:
            (stack / path.name).symlink_to(path)
    (packages / "stack.pth").write_text(f"{stack}\n")
    return root / "bin"


def run(installed, folder, *command):
    environment = {
        name: os.environ[name] for name in os.environ if name != "PYTHONPATH"
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{installed}:{os.environ['PATH']}",
    }
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def test_a_wheel_says_its_version_and_its_commands(installed, tmp_path):
    assert (
        run(installed, tmp_path, "syncrec", "--version").strip()
        == f"syncrec {__version__}"
    )
    assert "prepare" in run(installed, tmp_path, "syncrec", "--help")
    assert "--user-column" in run(
        installed, tmp_path, "syncrec", "prepare", "--help"
    )
    where = "import trainer; print(trainer.__file__)"
    assert str(installed.parent) in run(
        installed, tmp_path, "python", "-c", where
    )


def test_a_wheel_trains_and_evaluates_from_another_folder(
    installed, dataset, tmp_path
):
    settings = [*SETTINGS, *MODEL, "stream.workers=0"]
    run(
        installed,
        tmp_path,
        "syncrec",
        "train",
        f"data={dataset}",
        "run=run",
        *settings,
    )
    assert (tmp_path / "run" / "report.html").is_file()
    said = run(
        installed, tmp_path, "syncrec", "evaluate", "--run", "run", "--json"
    )
    assert '"NDCG@10"' in said
