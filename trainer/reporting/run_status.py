"""What state a run is in: a small file that the run keeps, and the sentence of its report.

    run/status.json    {"state": "training", "step": 40, "total_steps": 120, "time": …, "reason": ""}

A run that is killed leaves "training" behind. Who holds its lock then knows that it has ended.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.files.atomic import write_json
from trainer.run_files import STATUS

TRAINING = "training"
FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"


@dataclass(frozen=True)
class RunStatus:
    """A run's state after a step. time: ISO 8601. reason: why it has stopped, failed or ended early."""

    state: str
    step: int
    total_steps: int
    time: str
    reason: str = ""

    @classmethod
    def now(
        cls, state: str, step: int, total_steps: int, reason: str = ""
    ) -> "RunStatus":
        """A state as of now."""
        time = datetime.now().astimezone()
        reason = " ".join(reason.split())
        return cls(
            state, step, total_steps, time.isoformat(timespec="seconds"), reason
        )

    @classmethod
    def read(cls, run: Path) -> "RunStatus | None":
        """What a run has left; None where it has left nothing that can be read."""
        try:
            text = (run / STATUS).read_text(encoding="utf-8")
            record = json.loads(text)
            return cls(
                str(record["state"]),
                int(record["step"]),
                int(record["total_steps"]),
                str(record["time"]),
                str(record["reason"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, run: Path) -> None:
        """Leaves it in the run's folder."""
        write_json(run / STATUS, asdict(self))

    def describe(self, has_ended: bool = False) -> dict[str, Any]:
        """text, a sentence, and its sense, "good", "bad" or "".

        has_ended: no process trains this run any more, whatever the state says.

            Training, step 40 of 120, as of 2026-11-28 18:50.
            Stopped after step 40 of 120, 2026-11-28 18:50: as asked; the same command goes on.
        """
        place = f"step {self.step:,} of {self.total_steps:,}"
        time = _short_time(self.time)
        reason = self.reason.rstrip(".")
        if self.state == TRAINING and has_ended:
            text = (
                f"Ended without a word after {place}, last heard of {time} "
                "(killed, or its machine is gone): the same command goes on from its newest "
                "checkpoint."
            )
            return {"text": text, "sense": "bad"}
        if self.state == TRAINING:
            return {"text": f"Training, {place}, as of {time}.", "sense": ""}
        verb = self.state.capitalize()
        text = f"{verb} after {place}, {time}."
        if reason:
            text = f"{verb} after {place}, {time}: {reason}."
        sense = ""
        if self.state == FINISHED:
            sense = "good"
        elif self.state == FAILED:
            sense = "bad"
        return {"text": text, "sense": sense}


def _short_time(text: str) -> str:
    """2026-11-28T18:50:12+00:00 as 2026-11-28 18:50 UTC; another text as it is."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z")
    return text
