"""MLflow: a run of an experiment, in a store of its own or on a server.

MLFLOW_TRACKING_URI says which store or server; MLFLOW_TRACKING_USERNAME and other variables of
MLflow's own hold for it too. `log.project`, or else MLFLOW_EXPERIMENT_NAME, names the experiment.
"""

import contextlib
import os
import re
from pathlib import Path

from trainer.files.redact import redact_location
from trainer.reporting.run_status import FAILED, FINISHED, STOPPED
from trainer.reporting.trackers.tracker import (
    Scalars,
    TrackedRun,
    Tracker,
    keep_identity,
    read_identity,
)

PROJECT = "syncrec"
_REFUSED = re.compile(r"[^\w\-. :/]")  # letters that no name may have
_LONGEST_NAME = 250
_MOST_PARAMETERS = 100  # in one request
_LONGEST_PARAMETER = 6000
# MLflow's own retries would hide for minutes that a server is away; TrackerThread tries again.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}


class MetricNames:
    """Tags as MLflow takes them: another letter for those that it refuses, no two tags alike.

    loss/total                   loss/total
    validation mean/NDCG@10      validation mean/NDCG_10
    phi/Toys & games, 1/2        phi/Toys _ games_ 1_2
    """

    def __init__(self) -> None:
        self._by_tag: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, tag: str) -> str:
        """The name of a tag: the same each time."""
        if tag not in self._by_tag:
            name = self._choose(tag)
            self._by_tag[tag] = name
            self._taken.add(name)
        return self._by_tag[tag]

    def _choose(self, tag: str) -> str:
        # A name is a path, and what is a folder is no figure: one slash at most.
        group, slash, title = _REFUSED.sub("_", tag).partition("/")
        title = title.replace("/", "_").strip(".") or "_"
        name = f"{group or '_'}/{title}" if slash else group or "_"
        name = name[:_LONGEST_NAME]
        number = 2
        free = name
        while free in self._taken:
            free = f"{name[: _LONGEST_NAME - 8]} {number}"
            number += 1
        return free


class MLflow(Tracker):
    """A run of MLflow: settings as parameters, figures by step, the report as an artifact."""

    name = "mlflow"
    package = "mlflow"

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        self._mlflow = mlflow
        self._names = MetricNames()
        self._identity: str | None = None
        self._goes_on = False
        self._has_parameters = False
        self._newest_steps: dict[str, int] = {}

    def begin(self) -> str:
        """Begins the run, or goes on with the one that trackers.json names."""
        self._client = self._mlflow.MlflowClient()
        if self._identity is None:
            self._open_run()
        assert self._identity is not None
        if not self._goes_on and not self._has_parameters:
            self._log_parameters()
            self._has_parameters = True
        uri = redact_location(self._mlflow.get_tracking_uri())
        return f"run {self._identity} at {uri}"

    def _open_run(self) -> None:
        """Finds the run of before, or makes one."""
        folder = self._run.folder
        before = read_identity(folder, self.name)
        if before is not None:
            # One that was deleted there is begun anew.
            with contextlib.suppress(self._mlflow.MlflowException):
                self._client.get_run(before)
                self._client.update_run(before, status="RUNNING")
                self._identity = before
                self._goes_on = True
                return
        made = self._client.create_run(
            self._find_experiment(), run_name=self._run.name
        )
        self._identity = made.info.run_id
        keep_identity(folder, self.name, made.info.run_id)

    def _find_experiment(self) -> str:
        """The number of the experiment, which is made where it is not there."""
        name = (
            self._run.project
            or os.environ.get("MLFLOW_EXPERIMENT_NAME")
            or PROJECT
        )
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        return self._client.create_experiment(name)

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        parameters = []
        for key, value in self._run.parameters.items():
            text = str(value)[:_LONGEST_PARAMETER]
            parameters.append(Param(self._names.of(key), text))
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            request = parameters[begin : begin + _MOST_PARAMETERS]
            self._client.log_batch(self._identity, params=request)

    def log(self, scalars: Scalars, step: int) -> None:
        """Sends the figures in one request, but those that were sent before a resume."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = []
        for tag, value in scalars.items():
            name = self._names.of(tag)
            if step > self._newest_step(name):
                metrics.append(Metric(name, value, now, step))
        if metrics:
            self._client.log_batch(self._identity, metrics=metrics)

    def _newest_step(self, name: str) -> int:
        """The newest step of a metric that was logged before this process began."""
        if not self._goes_on:
            return -1
        if name not in self._newest_steps:
            history = self._client.get_metric_history(self._identity, name)
            steps = [metric.step for metric in history]
            self._newest_steps[name] = max(steps, default=-1)
        return self._newest_steps[name]

    def add_file(self, file: Path) -> None:
        """Keeps a file as an artifact of the run."""
        self._client.log_artifact(self._identity, str(file))

    def end(self, state: str) -> None:
        """Says there how the run has ended."""
        self._client.set_terminated(self._identity, status=_STATUS[state])
