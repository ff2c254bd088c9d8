"""MLflow, against its own store in a folder."""

import pytest

from trainer.reporting.trackers.mlflow import MetricNames, MLflow
from trainer.reporting.trackers.tracker import TrackedRun, read_identity

mlflow = pytest.importorskip(
    "mlflow", reason="needs the extra mlflow (CONTRIBUTING.md)"
)
SECRET = "https://user:hunter2hunter2@host/logs?key=hunter2"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A client of an empty store."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def open_run(folder, resume_step=None, project="shops"):
    folder.mkdir(exist_ok=True)
    parameters = {f"model.p{number}": number for number in range(120)}
    tracker = MLflow(
        TrackedRun(folder, "first", project, parameters, resume_step)
    )
    tracker.begin()
    return tracker


def history(client, run, name):
    metrics = client.get_metric_history(run, name)
    return sorted((metric.step, metric.value) for metric in metrics)


def test_a_run_has_parameters_figures_and_its_report(store, tmp_path):
    folder = tmp_path / "run"
    tracker = open_run(folder)
    tracker.log({"loss/total": 2.5, "phi/Toys & games": 0.5}, 10)
    tracker.summarize({"test mean/NDCG@10": 0.25}, 10)
    (folder / "report.html").write_text("the page")
    tracker.add_file(folder / "report.html")
    tracker.end("finished")
    experiment = store.get_experiment_by_name("shops")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.run_id == read_identity(folder, "mlflow")
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["model.p119"] == "119"
    assert run.data.metrics == {
        "loss/total": 2.5,
        "phi/Toys _ games": 0.5,
        "test mean/NDCG_10": 0.25,
    }
    (artifact,) = store.list_artifacts(run.info.run_id)
    assert artifact.path == "report.html"


def test_a_resumed_run_goes_on_and_sends_no_step_twice(store, tmp_path):
    folder = tmp_path / "run"
    tracker = open_run(folder)
    for step in (10, 20, 30):
        tracker.log({"loss/total": float(step)}, step)
    tracker.end("stopped")
    identity = read_identity(folder, "mlflow")
    assert store.get_run(identity).info.status == "KILLED"
    tracker = open_run(folder, resume_step=20)
    assert store.get_run(identity).info.status == "RUNNING"
    for step in (30, 40):
        tracker.log({"loss/total": float(step)}, step)
    tracker.log({"validation mean/MRR": 0.5}, 30)
    tracker.end("finished")
    assert read_identity(folder, "mlflow") == identity
    assert history(store, identity, "loss/total") == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (40, 40.0),
    ]
    assert history(store, identity, "validation mean/MRR") == [(30, 0.5)]


def test_a_run_that_was_deleted_there_is_begun_anew(store, tmp_path):
    folder = tmp_path / "run"
    open_run(folder)
    (folder / "trackers.json").write_text('{"mlflow": "gone"}')
    tracker = open_run(folder, resume_step=20)
    tracker.log({"loss/total": 1.0}, 30)
    identity = read_identity(folder, "mlflow")
    assert history(store, identity, "loss/total") == [(30, 1.0)]


def test_the_place_is_said_without_secrets(store, tmp_path, monkeypatch):
    tracker = open_run(tmp_path / "run")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: SECRET)
    assert "hunter2" not in tracker.begin()


def test_names_are_taken_by_mlflow_and_differ(store, tmp_path):
    domains = ["a", "a/b", "a@b", "a_b", "..", "", "本", "x" * 400, "a//b"]
    tags = [f"phi/{domain}" for domain in domains]
    names = MetricNames()
    assert len({names.of(tag) for tag in tags}) == len(tags)
    assert names.of("phi/a@b") == names.of("phi/a@b") == "phi/a_b 2"
    tracker = open_run(tmp_path / "run")
    tracker.log(dict.fromkeys(tags, 1.0), 1)
    identity = read_identity(tmp_path / "run", "mlflow")
    assert len(store.get_run(identity).data.metrics) == len(tags)
