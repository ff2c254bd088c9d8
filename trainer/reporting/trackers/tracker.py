"""A tracker: where a team looks at its runs, beside metrics.jsonl. TensorBoard, MLflow, W&B.

Each one is a `Tracker`, fed by a `TrackerThread` (trainer.reporting.trackers.thread), on the first
rank alone. A run goes on in the same run of the tracker when it is resumed: `trackers.json` in the
run's folder says which that is.

    run/trackers.json    {"mlflow": "8d1f…", "wandb": "k3x0…"}
"""

import contextlib
import importlib.util
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainer.errors import InputError
from trainer.files.atomic import write_json
from trainer.run_files import TRACKERS

DISTRIBUTION = "syncrec-trainer"

# What a tracker draws: a figure by its tag, such as "loss/total" or "phi/Books".
Scalars = dict[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    folder: the run's. name: what it is called there. project: the experiment or project that it
    belongs to; empty: the tool's own variable decides. parameters: settings by their dotted keys,
    without secrets. resume_step: of the checkpoint that it goes on from; None: it begins.
    """

    folder: Path
    name: str
    project: str
    parameters: dict[str, Any]
    resume_step: int | None = None


class Tracker(ABC):
    """One tool's run. The constructor imports the tool; the other methods may wait for a server.

    They may raise whatever the tool raises: the call is then made again later. So a call that was
    made in part may be made once more.
    """

    # As log.trackers, its extra and its error messages have it.
    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, run: TrackedRun):
        self._run = run

    @abstractmethod
    def begin(self) -> str:
        """Begins the run, or goes on with it. Returns where it is shown; empty: not worth a line."""

    @abstractmethod
    def log(self, scalars: Scalars, step: int) -> None:
        """Logs figures of a step. A step that the tool has from before a resume may be left out."""

    def summarize(self, scalars: Scalars, step: int) -> None:
        """Logs figures of the whole run: its test. step: of the model that was tested."""
        self.log(scalars, step)

    def add_file(self, file: Path) -> None:
        """Keeps a file of the run as an artifact, where the tool keeps files."""
        return

    @abstractmethod
    def end(self, state: str) -> None:
        """Ends it. state: FINISHED, STOPPED or FAILED of trainer.reporting.run_status."""


def require_package(kind: type[Tracker], switch: str) -> None:
    """Raises InputError, which names the extra, where a tracker's package is not installed.

    switch: the setting that asks for it.
    """
    if importlib.util.find_spec(kind.package) is None:
        raise InputError(
            f"{switch}: {kind.package} is not installed: pip install "
            f'"{DISTRIBUTION}[{kind.name}]", or leave {kind.name} out'
        )


def read_identity(folder: Path, name: str) -> str | None:
    """The tracker's own name of a run, from before; None where there is none."""
    try:
        text = (folder / TRACKERS).read_text(encoding="utf-8")
        identity = json.loads(text)[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(identity)


def keep_identity(folder: Path, name: str, identity: str) -> None:
    """Keeps the tracker's own name of a run, for when the run is resumed."""
    file = folder / TRACKERS
    identities = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        identities = dict(json.loads(file.read_text(encoding="utf-8")))
    identities[name] = identity
    write_json(file, identities)
