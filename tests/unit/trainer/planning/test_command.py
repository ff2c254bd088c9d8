"""`--plan` on a tiny dataset, in this process: what it says, and what it refuses."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch.train
from embeddings.placement import Room
from tests.helpers.alone import as_a_script
from tests.unit.trainer.planning.test_memory import (  # noqa: F401
    SETTINGS,
    TRIAL,
    dataset,
)
from trainer.config import load_config
from trainer.distributed.launchers import World
from trainer.errors import InputError
from trainer.planning.batch_load import measure_load
from trainer.planning.command import _count_hosts
from trainer.planning.machines import DEVICES, Machines, find_device
from trainer.planning.memory import plan_table
from trainer.planning.prediction import (
    RANKS,
    count_sent,
    make_plan,
    predict_seconds,
)
from trainer.planning.traffic import expected


@pytest.fixture
def plan(monkeypatch, capsys, dataset):  # noqa: F811
    """Runs `--plan` with more words, and returns what it prints."""

    def run(*words):
        settings = [*SETTINGS, f"data={dataset.folder}"]
        arguments = ["train.py", "--plan", *words, *settings]
        monkeypatch.setattr(sys, "argv", arguments)
        with as_a_script():
            launch.train.main()
        return capsys.readouterr().out

    return run


def test_a_plan_says_memory_network_time_and_what_it_assumes(plan):
    shown = plan("--ranks", "4", "--hosts", "2", "--gpu", "h100")
    for words in (
        "4 ranks on 2 hosts, H100 each",
        "ZeRO stage 0",
        "item table, its optimizer",
        "a checkpoint's copy",
        "row gradients",
        "messages",
        "most of it:",
        "512 on 64",
        "never measured",
    ):
        assert words in shown, words


@pytest.mark.parametrize(
    ("world", "ranks", "gpu", "hosts"),
    [
        (World(0, 16, 0, 8, "host0", 1), 16, None, 2),
        (World(0, 1, 0, 1, "host0", 1), 64, "H100", 8),
        (World(0, 1, 0, 1, "host0", 1), 12, "H100", 1),
        (World(0, 1, 0, 1, "host0", 1), 16, None, 1),
    ],
)
def test_where_nothing_says_how_many_hosts(world, ranks, gpu, hosts):
    assert _count_hosts(world, ranks, gpu) == hosts


def test_a_plan_of_one_rank_sends_nothing(plan):
    shown = plan()
    assert "1 rank on 1 host, this machine's processor" in shown
    assert "row gradients" not in shown
    assert "the dense model's arithmetic" in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ranks", "3", "--hosts", "2"], "as many on each host"),
        (["--ranks", "0"], "give at least 1"),
        (["--gpu", "abacus"], "give A100, H100, H200"),
        (["--between-gbit", "0"], "more than 0"),
        (["--ranks", "9"], "9 ranks, but"),
        (["--ranks", "4", "table.group_size=3"], "table.group_size=3: 4 ranks"),
    ],
)
def test_what_cannot_be_planned_is_one_line(plan, words, line, capsys):
    with pytest.raises(SystemExit) as left:
        plan(*words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_without_a_dataset_one_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", "--ranks", "2"])
    with as_a_script(), pytest.raises(SystemExit) as left:
        launch.train.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data=DIR is missing: --plan needs")
    assert error.count("\n") == 1


def test_a_plan_agrees_with_itself(dataset):  # noqa: F811
    config = load_config([], [*SETTINGS, "optimizer.zero_stage=1"])
    machines = Machines(4, 2, DEVICES["H200"], 100)
    made = make_plan(config, dataset, machines)
    by_part = expected(
        4,
        8,
        2,
        made.load.users,
        made.trial.weights,
        1,
        made.load.rows * 3 / 4,
    )
    # SC-MIM is off.
    assert set(by_part) - set(made.sent) == {"SC-MIM", "SC-MIM gradients"}
    for name, sent in made.sent.items():
        assert sent.bytes == by_part[name]
        assert sent.messages >= sent.collectives * 3
    assert made.seconds["SC-MIM"] == 0 < made.seconds["rows"]
    assert [line.machines.ranks for line in made.scaled] == list(RANKS)
    efficiencies = [line.efficiency for line in made.scaled]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert all(0 < share <= 1 for share in efficiencies)


@pytest.fixture(scope="module")
def run(dataset):  # noqa: F811
    """Settings, dataset, and what a step brings."""
    config = load_config([], SETTINGS)
    return config, dataset, measure_load(config, dataset, 8)


def test_a_plan_knows_copies_of_the_table(run):
    """Popular rows are in many ranks' batches, so all ranks look fewer up than each for itself."""
    one, dataset, load = run  # noqa: F811
    words = [*SETTINGS, "table.group_size=4", "table.communication=int8"]
    two = load_config([], words)
    machines = Machines(8, 2, DEVICES["H200"], 100)
    before = count_sent(one, dataset, machines, load, 1000)
    sent = count_sent(two, dataset, machines, load, 1000)
    assert before["rows"].bytes == load.rows * 7 / 8 * 4 * 8
    assert sent["rows"].bytes == load.rows * 3 / 4 * (8 + 8)
    rows = (sent["ids between copies"].bytes - 2 * 8) / 4
    assert load.rows / 8 < rows < load.rows
    assert sent["gradients between copies"].bytes == pytest.approx(rows * 2 * 8)
    assert sent["gradients between copies"].messages == 2
    assert sent["row gradients"].messages == 3
    assert set(sent) - set(before) == {
        "ids between copies",
        "gradients between copies",
    }
    seconds = predict_seconds(two, dataset, machines, load, TRIAL)
    assert seconds["copies"] > 0
    room = Room(None, 2**60)
    whole = plan_table(one, dataset, 8, room)
    copied = plan_table(two, dataset, 8, room)
    assert copied.host == pytest.approx(2 * whole.host, rel=0.1)
    assert copied.checkpoint == pytest.approx(whole.checkpoint, rel=0.1)


@given(
    gbit=st.floats(0.1, 10_000),
    more=st.floats(1, 100),
    hosts=st.integers(2, 64),
)
def test_a_quicker_link_makes_no_step_longer(run, gbit, more, hosts):
    config, dataset, load = run  # noqa: F811
    times = []
    for speed in (gbit, gbit * more):
        machines = Machines(8 * hosts, hosts, DEVICES["A100"], speed)
        seconds = predict_seconds(config, dataset, machines, load, TRIAL)
        times.append(sum(seconds.values()))
    assert times[0] >= times[1] > seconds["compute"] > 0


def test_a_gpu_is_found_by_its_name():
    assert find_device("h200") is DEVICES["H200"]
    with pytest.raises(InputError, match="give A100"):
        find_device("TPU")
