"""W&B (Weights & Biases): a run of a project, online or offline.

WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE and other variables of W&B's own hold. `log.project`, or else
WANDB_PROJECT, names the project. Its files are in the run's folder, or in WANDB_DIR.

What W&B would find out by itself is switched off: the command line and the environment may have
secrets, and the console is the run's own.
"""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from trainer.files.redact import redact_location
from trainer.reporting.console import escape_name
from trainer.reporting.run_status import FAILED
from trainer.reporting.trackers.tracker import (
    Scalars,
    TrackedRun,
    Tracker,
    keep_identity,
    read_identity,
)

PROJECT = "syncrec"
_QUIET = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "disable_code": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


class WeightsAndBiases(Tracker):
    """A run of W&B: settings as config, figures by step, the test in the summary."""

    name = "wandb"
    package = "wandb"

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        import wandb

        self._wandb = wandb
        self._opened: Any = None

    def begin(self) -> str:
        """Begins the run, or goes on with the one that trackers.json names."""
        run = self._run
        identity = read_identity(run.folder, self.name)
        if identity is None:
            identity = secrets.token_hex(8)
            keep_identity(run.folder, self.name, identity)
        if self._opened is None:
            self._require_key()
            self._opened = self._wandb.init(
                id=identity,
                resume="allow",
                # A notebook may have a run of its own.
                reinit="create_new",
                project=run.project
                or os.environ.get("WANDB_PROJECT")
                or PROJECT,
                name=run.name,
                dir=os.environ.get("WANDB_DIR") or str(run.folder),
                config=run.parameters,
                allow_val_change=True,
                settings=self._wandb.Settings(**_QUIET),
            )
        if self._opened.offline:
            return f"offline in {Path(self._opened.dir).parent}"
        # WANDB_MODE=disabled has none.
        return redact_location(self._opened.url or "")

    def _require_key(self) -> None:
        """Raises PermissionError where W&B would ask for a key on the terminal."""
        mode = self._wandb.setup().settings.mode
        if mode != "online" or self._wandb.login(prompt=False, verify=False):
            return
        raise PermissionError(
            "no API key: `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )

    def log(self, scalars: Scalars, step: int) -> None:
        """Logs the figures; W&B takes none of a step before its newest, which has them already."""
        if step < self._opened.step:
            return
        named = {}
        for tag, value in scalars.items():
            named[escape_name(tag)] = value
        self._opened.log(named, step=step)

    def summarize(self, scalars: Scalars, step: int) -> None:
        """Puts the figures into the summary: the tested model is of an earlier step."""
        summary: Scalars = {"test step": step}
        for tag, value in scalars.items():
            summary[escape_name(tag)] = value
        self._opened.summary.update(summary)

    def add_file(self, file: Path) -> None:
        """Keeps a copy among the files of W&B's run."""
        folder = Path(self._opened.dir)
        if folder.is_dir():
            copy = shutil.copy(file, folder)
            self._opened.save(copy, base_path=folder, policy="now")

    def end(self, state: str) -> None:
        """Ends the run, and waits for what is still being sent."""
        self._opened.finish(exit_code=int(state == FAILED))
