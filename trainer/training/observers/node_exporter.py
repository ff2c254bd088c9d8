"""Prometheus: a text file for the node exporter's textfile collector (`log.prometheus`).

    # HELP syncrec_step Steps made.
    # TYPE syncrec_step gauge
    syncrec_step{run="shop"} 1200
    syncrec_phi{run="shop",domain="Books"} -0.125

It is written anew, by an atomic rename, with each log record and validation, on the first rank. What
goes wrong with it ends no run.
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import RunState
from trainer.files.atomic import write_text
from trainer.run_files import HEADLINE
from trainer.training.callbacks import Callback
from trainer.training.run_context import RunContext

_LEAST_SECONDS = 5.0  # between two files
_PREFIX = "syncrec_"
_GAUGES = {
    "step": "Steps made.",
    "epoch": "The epoch, counted from 0.",
    "seconds": "Seconds spent in the run, restarts not counted.",
    "loss": "The loss, a mean over the interval.",
    "learning_rate": "The dense model's learning rate.",
    "gradient_norm": "The norm of the dense gradient.",
    "users_per_second": "Users a second, over all ranks.",
    "tokens_per_second": "Tokens a second, over all ranks.",
    "skipped_users": "Users of the interval that could not be read.",
    "data_wait": "Share of the time that waits for data.",
    "exchange": "Share of the time in exchanges between ranks.",
    "padding": "Share of the slots of attention that is padding.",
    "mfu": "Share of the devices' arithmetic that the model uses.",
    "memory_gb": "Peak memory of the first rank, in GB.",
    "lambda": "The loss correction weight of a domain, 1 for all alike.",
    "phi": "The negative transfer gap of a domain, below 0: harm.",
}
_VALIDATION = "validation_ndcg_at_10"
_ESCAPED = re.compile(r'[\\"\n]')


class NodeExporterFile(Callback):
    """Writes the file."""

    def __init__(self, file: Path, run: str, total_steps: int):
        """run: the label of all figures."""
        self._file = file
        self._run = run
        self._total_steps = total_steps
        self._train: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._warned = False
        self._due_at = 0.0

    def on_log(self, state: RunState, record: dict[str, Any]) -> None:
        """Writes it with the record's figures, where it is some seconds old."""
        self._train = record
        if time.monotonic() >= self._due_at:
            self._write()

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Writes it with the validation's figures."""
        self._validation = record
        self._write()

    def _write(self) -> None:
        try:
            write_text(self._file, self.text())
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: log.prometheus: {self._file} is not written: {error.strerror}; "
                    "the run goes on without it",
                    file=sys.stderr,
                    flush=True,
                )
            self._warned = True
        self._due_at = time.monotonic() + _LEAST_SECONDS

    def text(self) -> str:
        """The file's text."""
        lines: list[str] = []
        self._add(
            lines, "total_steps", "Steps of the whole run.", self._total_steps
        )
        for name, about in _GAUGES.items():
            self._add(lines, name, about, self._train.get(name))
        self._add(
            lines,
            _VALIDATION,
            f"{HEADLINE} of the last validation.",
            self._ndcg(),
        )
        self._add(
            lines,
            "written_seconds",
            "When the file was written, Unix time.",
            round(time.time(), 3),
        )
        return "\n".join(lines) + "\n"

    def _ndcg(self) -> dict[str, Any] | None:
        """The last validation's headline, by domain and their mean."""
        if not self._validation:
            return None
        values = {"mean": self._validation["mean"][HEADLINE]}
        for domain, figures in self._validation["domains"].items():
            values[domain] = figures.get(HEADLINE)
        return values

    def _add(self, lines: list[str], name: str, about: str, value: Any) -> None:
        """Adds a gauge; value: a number, or numbers by domain. What is null is left out."""
        by_domain = value if isinstance(value, dict) else {None: value}
        samples = []
        for domain, number in by_domain.items():
            if number is None:
                continue
            labels = f'run="{_escape(self._run)}"'
            if domain is not None:
                labels += f',domain="{_escape(domain)}"'
            samples.append(f"{_PREFIX}{name}{{{labels}}} {number}")
        if samples:
            lines.append(f"# HELP {_PREFIX}{name} {about}")
            lines.append(f"# TYPE {_PREFIX}{name} gauge")
            lines += samples


def open_node_exporter(context: RunContext) -> list[NodeExporterFile]:
    """The callback that writes the file, on the first rank where it is asked for."""
    file = context.config.log.prometheus
    if not file or not context.ranks.first:
        return []
    # Jinja2 comes with it.
    from trainer.reporting.html import page_title

    name = page_title(context.folder)
    total_steps = context.trainer.total_steps
    return [NodeExporterFile(Path(file), name, total_steps)]


def _escape(label: str) -> str:
    """A label's value as Prometheus' text format has it."""

    def escape(match: re.Match[str]) -> str:
        letter = match[0]
        return r"\n" if letter == "\n" else f"\\{letter}"

    return _ESCAPED.sub(escape, label)
