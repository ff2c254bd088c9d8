import json
import socket
import sys
from pathlib import Path

import pytest
import torch

import launch.train
from tests.helpers.alone import as_a_script
from tests.helpers.made import draw_histories, write_dataset
from tests.helpers.rank_processes import forked_python, run_alone
from trainer.config.load import load_config

BIN = Path(sys.executable).parent
MODEL = [
    "model.dim=8",
    "model.ffn_dim=8",
    "model.experts=2",
    "model.cross_experts=1",
]
SMALL = [*MODEL, "global_batch_size=8", "stream.shuffle=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty users in four shards of one stream."""
    return write_dataset(
        tmp_path_factory.mktemp("train") / "data",
        draw_histories(40),
        cuts=(10, 20, 30),
    ).folder


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs the script's main in this process and gives back the one line with which it refuses."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            launch.train.main()
        assert left.value.code == 2
        output = capsys.readouterr()
        # Standard output says how far it came; the refusal is one line on stderr.
        for line in output.out.splitlines():
            assert line.startswith(("reads the dataset", "makes the model"))
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        return output.err

    with as_a_script():
        yield main


def test_the_effective_configuration_can_be_seen_without_a_run(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--show-config",
            f"run={tmp_path / 'run'}",
            "model.mutual_information=off",
        ],
    )
    with as_a_script():
        launch.train.main()
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    expected = load_config(
        [], [f"run={tmp_path / 'run'}", "model.mutual_information=off"]
    )
    assert load_config([tmp_path / "shown.yaml"], []) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--config", "amazon4"], "time_knots: 170"),
        (["--config", "default"], "time_knots: 128"),
        (["config=paper"], "time_knots: 0"),
        ([], "time_knots: 128"),
    ],
)
def test_a_preset_is_shown_by_its_name_from_any_folder(
    monkeypatch, capsys, tmp_path, words, shown
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--show-config", *words])
    launch.train.main()
    assert shown in capsys.readouterr().out


def another_format(folder):
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(
        json.dumps(facts | {"format_version": 7})
    )


def without_a_shard(folder):
    (folder / "shards" / "000002.tar").unlink()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["data={data}"], ["run=DIR is missing"]),
        (["run={run}"], ["data=DIR is missing"]),
        (["data={run}-no", "run={run}"], ["-no", "not a dataset folder"]),
        (
            ["data={data}", "run={run}", "modle.dim=3"],
            ["'modle'", "model, table"],
        ),
        (
            ["data={data}", "run={run}", "model.dropout=2"],
            ["model.dropout is 2"],
        ),
        (["data={data}", "run={run}", "steps"], ["steps", "key=value"]),
        (
            ["--config", "{run}.yaml", "data={data}", "run={run}"],
            ["run.yaml", "no such"],
        ),
        (
            ["--deepspeed_config", "{run}.json", "data={data}", "run={run}"],
            ["run.json", "cannot be read"],
        ),
        (
            ["data={data}", "run={run}", "deepspeed.fp16.enabled=true"],
            ["deepspeed.fp16", "bf16"],
        ),
        (
            [
                "data={data}",
                "run={run}",
                "deepspeed.gradient_accumulation_steps=4",
            ],
            ["gradient_accumulation_steps"],
        ),
        (
            ["data={data}", "run={run}", "table.optimizer=adam"],
            ["table.optimizer=adam", "cpu", "rowwise_adagrad"],
        ),
        (["data={data}", "run={run}", "model.dim=63"], ["model.dim is 63"]),
        (
            ["data={data}", "run={run}", "deepspeed.zero_optimization.stage=7"],
            ["deepspeed", "stage"],
        ),
        (
            ["data={data}", "run={run}", "--device", "cuda"],
            ["device is cuda", "device=cpu"],
        ),
        (
            ["data={data}", "run={run}", "device=cuda"],
            ["device is cuda", "device=cpu"],
        ),
        (
            ["--config", "amazon", "data={data}", "run={run}"],
            ["amazon: there is no", "amazon4, default"],
        ),
    ],
)
def test_settings_that_cannot_be_used_are_one_line_and_leave_nothing(
    refused, data, tmp_path, settings, named
):
    if torch.cuda.is_available() and "table.optimizer=adam" in settings:
        pytest.skip("CUDA has this optimizer")
    message = refused(
        *(word.format(data=data, run=tmp_path / "run") for word in settings)
    )
    assert all(word in message for word in named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (another_format, ["format_version 7", "reads 5"]),
        (without_a_shard, ["000002.tar is missing"]),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_line_and_leaves_nothing(
    refused, tmp_path, spoil, named
):
    folder = write_dataset(
        tmp_path / "data", draw_histories(40), cuts=(10, 20, 30)
    ).folder
    spoil(folder)
    message = refused(f"data={folder}", f"run={tmp_path / 'run'}")
    assert all(word in message for word in named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["a folder with a file", "a file"])
def test_what_the_run_folder_already_holds_stays(refused, data, tmp_path, kind):
    taken = tmp_path / "run"
    if kind == "a file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / "notes.txt").write_text("mine")
    assert "run: already holds something" in refused(
        f"data={data}", f"run={taken}"
    )
    assert (
        taken if kind == "a file" else taken / "notes.txt"
    ).read_text() == "mine"
    assert taken.is_file() or len(list(taken.iterdir())) == 1


def finish(*command):
    """Exit status and stderr of a command of a person's shell."""
    if command[0] == sys.executable:
        done = run_alone(*command[1:])
    else:
        done = run_alone(*command, FORKED_PYTHON=forked_python())
    return done.returncode, done.stderr


@pytest.mark.ranks
def test_an_unknown_key_in_a_shell(data, tmp_path):
    status, errors = finish(
        sys.executable,
        "launch/train.py",
        f"data={data}",
        f"run={tmp_path / 'run'}",
        "epoch=3",
    )
    assert status == 2
    assert (
        errors.startswith("error: epoch=3: Key 'epoch' not in 'RunConfig'")
        and errors.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
def test_a_changed_shard_is_found_while_training(tmp_path):
    dataset = write_dataset(
        tmp_path / "data", draw_histories(40), cuts=(10, 20, 30)
    )
    shard = dataset.folder / dataset.shards[2].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # beyond the archive's end: only the checksum tells
    shard.write_bytes(content)
    status, errors = finish(
        sys.executable,
        "launch/train.py",
        f"data={dataset.folder}",
        f"run={tmp_path / 'run'}",
        *SMALL,
    )
    assert status == 2
    assert (
        errors.startswith(
            f"error: {shard}: its sha256 is not the one in dataset.json"
        )
        and errors.count("\n") == 1
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.ranks
def test_more_ranks_than_streams(data, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", port]
    status, errors = finish(
        *launcher,
        "launch/train.py",
        f"data={data}",
        f"run={tmp_path / 'run'}",
        *SMALL,
    )
    assert status == 2
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: 2 ranks, but {data} has 1 streams: use at most as many ranks, or prepare again with --streams 2 or more, "
        "best a multiple of the ranks"
    ]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
