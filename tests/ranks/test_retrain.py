"""Days in a row by the real scripts: a base, a day by two ranks that brings a domain and outgrows a room, a kill on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launch.evaluate
from tests.helpers.alone import as_a_script
from tests.helpers.rank_processes import forked_python, run_alone

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
folder: {folder}
settings: [stream.workers=0, global_batch_size=16, model.dim=8, model.ffn_dim=8, model.max_length=8, model.experts=2,
  model.cross_experts=1, model.blocks=1, model.time_knots=4, model.prediction=cross, negatives.shared=8, epochs=2, log.tensorboard=false]
warm_settings: [epochs=1]
tolerance: 1.0
fall: 1.0
domain_fall: 1.0
"""


def log(file, first, items, domains, users=40, seed=0):
    """Rows of a day: a walk through a domain's items for each user."""
    draw = random.Random(seed)
    rows = [
        (
            f"u{user}",
            f"{domain}{draw.randrange(items)}",
            domain,
            first + draw.randrange(1000),
        )
        for user in range(users)
        for domain in domains
        for _ in range(draw.randrange(3, 7))
    ]
    columns = zip(
        ("user_id", "item_id", "domain", "timestamp"),
        zip(*rows, strict=True),
        strict=True,
    )
    pq.write_table(pa.table(dict(columns)), file)
    return file


def command(folder, name, logs, *settings):
    given = [f"name={name}", f"input=[{logs}]", *settings]
    return [
        sys.executable,
        ROOT / "launch/retrain.py",
        "--config",
        folder / "retrain.yaml",
        *given,
    ]


def retrained(folder, name, logs, *settings, status=0):
    _, *words = command(folder, name, logs, *settings)
    done = run_alone(*words, timeout=900, FORKED_PYTHON=forked_python())
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == status, said
    return json.loads(
        (folder / "days" / name / "retrain.json").read_text()
    ), done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrain")
    (folder / "retrain.yaml").write_text(SETTINGS.format(folder=folder))
    result, _ = retrained(folder, "1", log(folder / "1.parquet", 0, 20, "ab"))
    assert result["published"] == "0001"
    return folder


def test_a_day_of_two_ranks_brings_a_domain_and_outgrows_a_room(base):
    torchrun = [
        forked_python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    logs = log(base / "2.parquet", 1000, 150, "ac", users=60, seed=2)
    result, said = retrained(
        base, "2", logs, f"launcher={[str(word) for word in torchrun]}"
    )
    assert (
        result["published"] == "0002" and result["extension"]["laid_out_anew"]
    )
    assert list(result["extension"]["domains"]) == ["a", "b", "c"]
    assert "begins with the model of" in said
    assert result["drift"].keys() == {"a", "b"} and all(
        own["mean"] > 0.5 for own in result["drift"].values()
    )
    current = json.loads((base / "published/current.json").read_text())
    example = base / "published" / current["model"] / "example.py"
    asked = run_alone(example, "c", "3", "900:a:a1")
    assert len(asked.stdout.splitlines()) == 3, asked.stderr
    report = (base / "days/2/report.md").read_text()
    assert (
        "Published as version 0002." in report
        and "Domains were laid out anew." in report
    )


@pytest.fixture
def evaluated(monkeypatch):
    """evaluated(*words): how `launch/evaluate.py` ends in this process, as the only rank."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        with as_a_script():
            launch.evaluate.main()

    return run


def test_two_ranks_rank_a_days_events_as_one_does(base, evaluated, capsys):
    """And before the day's model is there: by the model of the day before."""
    first = json.loads((base / "days/1/retrain.json").read_text())
    assert first["arrivals"] == {"skipped": "no model served yet"}
    record = json.loads((base / "days/2/arrivals.json").read_text())
    assert record["domains"]["a"]["users"] > 10
    assert record["unseen"]["model"]["a"]["users"] > 100
    assert record["domains"]["c"]["users"] == 0  # the model has no such domain
    assert record["unseen"]["model"]["c"]["users"] > 100
    assert record["recency"]["a"]["NDCG@10"] > 0
    current = json.loads((base / "published/current.json").read_text())
    version = base / "published/versions" / current["version"]
    kept = json.loads((version / "version.json").read_text())
    assert kept["arrivals"] == record
    words = ["--run", base / "days/1/run", "--data", base / "days/2/dataset"]
    evaluated(*words, "--split", "arrivals", "--json")
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == record
    for option in (["--ranking", "full"], ["--output", base / "x.parquet"]):
        with pytest.raises(SystemExit):
            evaluated(*words, "--split", "arrivals", *option)
        assert option[0] in capsys.readouterr().err


STAGES = {
    "prepare": "days/3/.dataset.work",
    "evaluate": "days/3/dataset",
    "train": "days/3/run/checkpoints",
    "publish": "published/versions/*.partial",
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_each_stage_it_ends_with_the_same_model(base, tmp_path):
    """Each stage's own files say when it is at work; then the job and all that it started get SIGKILL."""
    logs, found = log(tmp_path / "3.parquet", 2000, 30, "ab", seed=3), {}
    shutil.copytree(base, tmp_path / "as it was")
    for stage in (None, *STAGES):
        shutil.rmtree(base)
        shutil.copytree(tmp_path / "as it was", base)
        before = json.loads((base / "published/current.json").read_text())
        if stage is not None:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            quiet = {
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.DEVNULL,
                "start_new_session": True,
            }
            job = subprocess.Popen(
                command(base, "3", logs), cwd=ROOT, env=environment, **quiet
            )
            deadline = time.monotonic() + 300
            while (
                not list(base.glob(STAGES[stage]))
                and time.monotonic() < deadline
            ):
                assert job.poll() is None, f"{stage} was never seen at work"
                time.sleep(0.01)
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            assert not (base / "days/3/retrain.json").exists()
            assert (
                json.loads((base / "published/current.json").read_text())
                == before
            )
            assert (
                base / "published" / before["model"] / "encoder.pt2"
            ).is_file()
        result, _ = retrained(base, "3", logs)
        model = (
            base
            / "published"
            / json.loads((base / "published/current.json").read_text())["model"]
        )
        files = {
            path.relative_to(model): path.read_bytes()
            for path in model.glob("domain-*/items.npy")
        }
        found[stage] = result["domains"], files
    assert all(found[stage] == found[None] for stage in STAGES)
