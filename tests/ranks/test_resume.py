"""A run that is killed or stopped, anywhere, and gone on with, anyhow, is the run that nothing happened to."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import HELPERS
from tests.helpers.left import assert_same, losses
from tests.helpers.rank_processes import forked_python
from tests.helpers.stages import SETTINGS
from tests.ranks.conftest import ranks_of, run
from trainer.checkpoint.layout import list_checkpoints
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule

WORKER = HELPERS.joinpath("faulty.py")
BATCH = 30


LOST = 4  # trainer.errors.LostRanks; DeepSpeed's launcher gives the status of the rank that it sees first


def train(
    ranks, dataset, folder, *settings, status=(0,), fault=None, **environment
):
    """A run through launch/train.py, to its end or to the fault ("STEP RANK WHAT")."""
    if fault is not None:
        environment["FAULT"] = f"{fault} {folder}-{fault.replace(' ', '-')}"
    command = ranks_of(
        ranks, WORKER, f"data={dataset}", f"run={folder}", *SETTINGS, *settings
    )
    return run(command, status=status, OMP_NUM_THREADS="1", **environment)


EPOCHS = [
    "max_steps=0",
    "model.dropout=0.2",
    "accumulation=2",
    "optimizer.ema=0.9",
    "stream.workers=1",
    "checkpoint.every_steps=4",
]


@pytest.mark.parametrize(
    ("epochs", "kills"), [(2, 4), pytest.param(3, 10, marks=pytest.mark.slow)]
)
def test_kills_change_nothing(dataset, tmp_path, epochs, kills):
    """Dropout on, a loader's worker process on: weights, table and optimizers' states are equal to the bit, and in every epoch
    every user was fed once."""
    whole, killed, fed = (
        tmp_path / "whole",
        tmp_path / "killed",
        tmp_path / "fed",
    )
    fed.mkdir()
    settings = [f"epochs={epochs}", *EPOCHS]
    train(2, dataset, whole, *settings)
    draw = random.Random(3)
    last = max(losses(whole))
    for _ in range(kills):
        at = list_checkpoints(killed)
        begun = int(at[0].name.removeprefix("step-")) if at else 0
        fault = f"{draw.randint(begun + 1, min(begun + 7, last))} {draw.randrange(2)} KILL"
        marker = Path(f"{killed}-{fault.replace(' ', '-')}")
        marker.unlink(missing_ok=True)
        done = train(
            2,
            dataset,
            killed,
            *settings,
            fault=fault,
            status=(256 - 9, LOST),
            FED=str(fed),
        )
        assert marker.exists() and "lost the others" in done.stderr
    train(2, dataset, killed, *settings, FED=str(fed))
    assert_same(killed, whole)
    assert each_user_once(fed, dataset) == epochs


def users_by_step(folder):
    """Whom all ranks together were fed in each step."""
    found = {}
    for file in folder.iterdir():
        for record in map(json.loads, file.read_text().splitlines()):
            found.setdefault(record["step"], []).extend(record["users"])
    return {step: sorted(users) for step, users in found.items()}


def each_user_once(folder, dataset):
    """How many epochs the ranks were fed, each user exactly once in each; steps that were run again count as the last time,
    and fed the same users every time."""
    dataset = Dataset.load(dataset)
    last, before = {}, {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            record = json.loads(line)
            key = record["step"], record["ranks"], file.name
            assert before.setdefault(key, record["users"]) == record["users"]
            last[key] = record["users"]
    plan, epochs = BatchSchedule(dataset, BATCH, 1, seed=0), {}
    for (step, _, _), users in last.items():
        epochs.setdefault(plan.locate(step - 1)[0], Counter()).update(users)
    for epoch, users in epochs.items():
        assert users == Counter(range(dataset.users)), f"epoch {epoch}"
    return len(epochs)


def test_other_numbers_of_ranks_and_other_stages_go_on_alike(dataset, tmp_path):
    """2 → 1 → 4 → 2 ranks, ZeRO 1 → 3 → 2 → 0, by SIGTERM and SIGUSR1 in the middle of a step. The four have two copies of the
    table, the others one. Largest differences seen: losses 3e-7, any tensor 2e-6."""
    settings = [
        "max_steps=20",
        "optimizer.ema=0.9",
        "checkpoint.every_epochs=0",
        "checkpoint.every_minutes=0",
    ]
    whole, moved, fed = (
        tmp_path / "whole",
        tmp_path / "moved",
        (tmp_path / "fed-whole", tmp_path / "fed-moved"),
    )
    for folder in fed:
        folder.mkdir()
    train(2, dataset, whole, *settings, FED=str(fed[0]))
    for ranks, stage, fault, step in (
        (2, 1, "5 0 TERM", 5),
        (1, 3, "9 0 USR1", 9),
        (4, 2, "15 3 TERM", 15),
    ):
        stage = f"optimizer.zero_stage={stage}"
        copies = f"table.group_size={2 if ranks == 4 else 0}"
        done = train(
            ranks,
            dataset,
            moved,
            *settings,
            stage,
            copies,
            fault=fault,
            status=(75,),
            FED=str(fed[1]),
        )
        assert (
            f"stopped after step {step}, as asked" in done.stderr
            and "Traceback" not in done.stderr
        )
        assert (
            list_checkpoints(moved)[0].name == f"step-{step:08d}"
        )  # of that very step
    done = train(
        2, dataset, moved, *settings, "optimizer.zero_stage=0", FED=str(fed[1])
    )
    assert (
        users_by_step(fed[0]) == users_by_step(fed[1])
        and len(users_by_step(fed[0])) == 20
    )
    assert f"goes on from {moved}/checkpoints/step-00000015" in " ".join(
        done.stdout.split()
    )
    assert_same(moved, whole, tolerance=1e-5)
    again = train(
        1, dataset, moved, *settings
    )  # it is finished: the same figures, no step
    assert again.stdout.count(" step 20/20 ") == 1 and " test " in again.stdout
    assert_same(moved, whole, tolerance=1e-5)


def test_what_has_changed_is_listed(dataset, tmp_path):
    one, folder = ["max_steps=2"], tmp_path / "run"
    train(1, dataset, folder, *one)
    before = sorted((folder / "checkpoints").iterdir())
    done = train(
        1, dataset, folder, *one, "seed=5", "model.eta=0.8", status=(2,)
    )
    assert (
        "its checkpoint was made otherwise: model.eta was" in done.stderr
        and "seed was 0, is 5" in done.stderr
    )
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    done = train(1, dataset, folder, *one, "--fresh", status=(2,))
    assert f"error: {folder}: already holds a run" in done.stderr
    assert sorted((folder / "checkpoints").iterdir()) == before
    done = train(
        1, dataset, folder, "max_steps=3", "model.eta=0.8", "--accept-changes"
    )
    # Under a schedule that falls towards the last step, another last step is a change too.
    assert (
        "goes on though it was made otherwise: max_steps was 2, is 3; model.eta was 0.9, is 0.8"
        in done.stderr
    )
    assert list_checkpoints(folder)[0].name == "step-00000003"


FOURTEEN_STEPS = ["max_steps=14", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """Fourteen steps to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(2, dataset, folder, *FOURTEEN_STEPS)
    return folder


@pytest.mark.parametrize(
    "what", ["nan", "raise", pytest.param("hang", marks=pytest.mark.slow)]
)
def test_a_fault_ends_all_ranks_with_its_cause_and_keeps_the_last_checkpoint(
    dataset, undisturbed, tmp_path, what
):
    settings = [
        *FOURTEEN_STEPS,
        f"timeout_minutes={0.1 if what == 'hang' else 5}",
        "checkpoint.every_epochs=0",
    ]
    folder = tmp_path / "run"
    expected = {"nan": (3,), "raise": (1, LOST), "hang": (LOST,)}[what]
    done = train(
        2, dataset, folder, *settings, fault=f"12 1 {what}", status=expected
    )
    if what == "nan":
        assert (
            "error: step 12 (batch 11 of epoch 0): the gradient is not finite; neither weights nor table"
            in done.stderr
        )
        assert done.stderr.count("error: ") == 1
    elif what == "raise":
        assert (
            "rank 1 on " in done.stderr
            and "ZeroDivisionError: by the test" in done.stderr
        )
    else:
        assert "error: rank 0: lost the others" in done.stderr
    # Where all ranks end together, a checkpoint that is being written is ended too; where one dies, it may be lost.
    assert (
        list_checkpoints(folder)[0].name
        in ("step-00000010", "step-00000005")[: 1 if what == "nan" else 2]
    )
    train(2, dataset, folder, *settings)
    assert_same(folder, undisturbed)


def test_a_run_begins_again_by_itself(dataset, undisturbed, tmp_path):
    settings = FOURTEEN_STEPS
    folder = tmp_path / "run"
    done = train(
        2,
        dataset,
        folder,
        *settings,
        "--max-restarts",
        "2",
        fault="12 1 KILL",
        FORKED_PYTHON=forked_python(),
    )
    assert "rank 1: ended with signal 9; restart 1 of 2" in done.stderr
    assert "rank 0: ended with status 4; restart 1 of 2" in done.stderr
    assert f"goes on from {folder}/checkpoints/step-000000" in " ".join(
        done.stdout.split()
    )
    assert_same(folder, undisturbed)
