"""The trainer's rooms import downwards only, light pages stay light, and a search finds the field's words."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import style
from tests.unit.test_architecture import imports

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ROOT / "trainer"

# From the ground up: a room imports only rooms before it.
ROOMS = (
    "run_files",
    "process_name",
    "interrupts",
    "child_processes",
    "errors",
    "files",
    "config",
    "distributed",
    "data",
    "checkpoint",
    "evaluation",
    "reporting",
    "training",
    "planning",
    "doctor",
    "serving",
    "retraining",
    "study",
    "api",
)
HEAVY = ("torch", "deepspeed", "torchrec", "fbgemm_gpu")
LIGHT = (
    "trainer",
    "trainer.config",
    "trainer.run_files",
    "trainer.evaluation.metrics",
    "trainer.reporting",
    "trainer.reporting.run_report",
    "trainer.reporting.run_log",
    "trainer.retraining",
    "trainer.retraining.report",
    "trainer.retraining.job",
)
# The field's word, and the files of the product that do it.
WORDS = {
    "atomic": "trainer/files/atomic.py",
    "leave-one-out": "trainer/data/split.py",
    "early stopping": "trainer/training/callbacks.py",
    "preemption": "trainer/distributed/preemption.py",
    "sampler": "trainer/data/loading/batch_schedule.py",
    "inference": "trainer/serving/recommend.py",
    "ablation": "trainer/study/baselines.py",
    "baseline": "trainer/study/baselines.py",
    "confidence interval": "trainer/evaluation/bootstrap.py",
    "cold start": "embeddings/warm_start.py",
    "hyperparameter": "trainer/study/plan.py",
    "learning-rate schedule": "trainer/config/optimizer.py",
    "prefetch": "trainer/training/prefetch.py",
    "negative sampling": "trainer/data/loading/negative_sampling.py",
}


def room_of(file: Path) -> str:
    """The room that a file of the trainer is in; "" for trainer/__init__.py, which loads lazily."""
    name = file.relative_to(TRAINER).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported_rooms(source: str) -> Iterator[str]:
    """The rooms that a module imports, inside functions and for types too."""
    for name in imports(source, "trainer.module"):
        parts = name.split(".")
        is_room = len(parts) > 1 and not parts[1].startswith("__")
        if parts[0] == "trainer" and is_room:
            yield parts[1]


def upward_imports(room: str, source: str) -> list[str]:
    """The rooms above its own that a module imports."""
    height = ROOMS.index(room)
    upward = []
    for name in imported_rooms(source):
        if name != room and (name not in ROOMS or ROOMS.index(name) > height):
            upward.append(name)
    return upward


FILES = sorted(file for file in TRAINER.rglob("*.py") if room_of(file))


@pytest.mark.parametrize(
    "file", FILES, ids=[str(file.relative_to(TRAINER)) for file in FILES]
)
def test_rooms_import_downwards(file):
    assert upward_imports(room_of(file), file.read_text(encoding="utf-8")) == []


def test_every_room_is_in_the_order():
    assert {room_of(file) for file in FILES} == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("data", "from trainer.checkpoint.load import find_newest"),
        ("config", "def f():\n    import trainer.data.split"),
        ("evaluation", "from trainer.reporting import console"),
        ("files", "from trainer import config"),
    ],
)
def test_an_upward_import_is_seen(room, source):
    assert upward_imports(room, source)


def loaded_engines(program: str) -> str:
    """The heavy packages that a program has loaded in the end, as Python writes a list."""
    program += f"\nprint([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.ranks
def test_preparing_from_python_loads_no_engine(tmp_path):
    log = "user_id,item_id,domain,timestamp\nu,i,d,1\nu,j,d,2\nu,k,d,3\n"
    (tmp_path / "log.csv").write_text(log)
    program = (
        "import sys\nfrom trainer import prepare\n"
        f"prepare({str(tmp_path / 'log.csv')!r}, {str(tmp_path / 'data')!r})"
    )
    assert loaded_engines(program) == "[]"


@pytest.mark.ranks
@pytest.mark.parametrize("module", LIGHT)
def test_a_light_page_loads_no_engine(module):
    assert loaded_engines(f"import sys, {module}") == "[]"


def test_no_folder_is_too_full():
    folders = [ROOT / name for name in style.PRODUCT]
    assert style.full_folders(folders) == []


@pytest.mark.parametrize(("word", "file"), WORDS.items(), ids=list(WORDS))
def test_a_search_for_the_fields_word_finds_the_file_that_does_it(word, file):
    text = " ".join((ROOT / file).read_text(encoding="utf-8").lower().split())
    text = text.replace("# ", "")
    assert word in text or word.replace(" ", "_") in text
