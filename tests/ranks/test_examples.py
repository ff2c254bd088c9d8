"""The examples run: the notebook in a kernel, the scripts as a person would start them."""

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.rank_processes import forked_python
from tests.ranks.conftest import BIN, ROOT, free_port, run
from trainer.config.prepare import SyntheticConfig
from trainer.data.synthetic import synthesize_logs

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What examples/own_logs.py leaves: data, run, recommendations."""
    folder = tmp_path_factory.mktemp("examples")
    config = SyntheticConfig(
        users=200, items=150, domains=3, mean_length=15, topics=8
    )
    synthesize_logs(folder / "logs", config)
    done = run(
        [BIN / "python", EXAMPLES / "own_logs.py", folder / "logs", folder]
    )
    assert "recommendations in" in done.stdout
    assert (folder / "run" / "report.html").is_file()
    return folder


@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path, monkeypatch):
    """DataFrame in, prepared, trained twice in one process, evaluated, recommended, exported: one encoder, each takes seconds."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    (cell,) = [
        cell for cell in notebook.cells if "\nmodel = {\n" in cell.source
    ]
    smaller = "\nmodel = {\n    'prediction': 'cross', 'time_knots': 0,\n"
    cell.source = cell.source.replace("\nmodel = {\n", smaller)
    # The kernel is forked where the stack is loaded.
    kernel = tmp_path / "kernels" / "forked" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    launcher = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": [forked_python(), *launcher], "display_name": "forked"}
    kernel.write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    client = NotebookClient(notebook, timeout=600, kernel_name="forked")
    client.execute()
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    text = json.dumps(outputs)
    assert "NDCG@10" in text and "encoder.pt2" in text and "history" in text
    assert "error" not in {
        output["output_type"] for each in outputs for output in each
    }


def test_a_metric_of_ones_own_is_called(made, tmp_path):
    script = EXAMPLES / "custom_metric.py"
    done = run([BIN / "python", script, made / "data", tmp_path / "run"])
    assert "of the domains lies" in done.stdout
    assert "steps, the last loss is" in done.stdout


def test_an_export_is_served(one_encoder, tmp_path):
    run(
        [
            BIN / "python",
            "launch/export.py",
            "--run",
            one_encoder,
            "--output",
            tmp_path / "m",
        ]
    )
    port = free_port()
    command = [
        forked_python(),
        EXAMPLES / "serve.py",
        tmp_path / "m",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment)
    try:
        schema = json.loads((tmp_path / "m" / "schema.json").read_text())
        domain = schema["domains"][0]["name"]
        address = f"http://127.0.0.1:{port}/?domain={domain}&k=3"
        for _ in range(300):
            assert server.poll() is None
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    items = json.load(answer)
                break
            except OSError:
                time.sleep(0.2)
        assert len(items) == 3 and items[0].keys() == {"item", "score"}
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_two_ranks_and_then_one_train_one_run(made, tmp_path):
    settings = Path(EXAMPLES / "two_ranks.sh")
    done = run(
        [str(settings), str(made / "data"), str(tmp_path / "run")], timeout=500
    )
    assert "goes on from" in done.stdout
