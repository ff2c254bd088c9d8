"""A run's log: `metrics.jsonl`, lines on the console, and a progress bar.

`metrics.jsonl` is the one that lasts. It holds one JSON object a line, a train record for each
logging interval and a record for each evaluation, in the order in which they happened. Intervals
grow from one step to `log.every`, so that a run of any length has curves.
`trainer/reporting/run_report.py` draws from it and from nothing else. Trackers get its records too
(trainer.training.observers.tracking). Its figures:

    train        kind "train", step, epoch, seconds (since the start), loss, loss_single,
                 loss_cross, mutual_information (null without SC-MIM), single_by_domain,
                 cross_by_domain (losses),
                 lambda (weights, 1 where all domains weigh alike), phi (eq. 10, below 0 =
                 negative transfer), alpha, beta, learning_rate, gradient_norm,
                 users_per_second, tokens_per_second, skipped_users (over all ranks in the interval: they could not be
                 read, see stream.damaged), data_wait (share of the time, 0 to 1), exchange (the same
                 of exchanges with other ranks, waiting for them included; null on CUDA), padding
                 (share of attention's slots), mfu (null without profile.peak_tflops), memory_gb
    evaluation   kind "validation" or "test", step, epoch, seconds, validation_seconds (what a
                 validation took, in `seconds`), and the figures that
                 trainer/evaluation/evaluation.py lists

`seconds` is filled in where a record comes without it. A figure that is missing, infinite or not a
number is null, as a NaN literal would break every JSON reader but Python's.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from trainer.errors import InputError
from trainer.files.atomic import write_text
from trainer.files.progress import Heartbeat
from trainer.reporting.console import (
    ProgressBar,
    escape_name,
    format_duration,
)
from trainer.reporting.line_folding import (
    WIDTH_IN_A_PIPE,
    fold_line,
    wrap_message,
)
from trainer.reporting.log_lines import LogLines
from trainer.run_files import METRICS_FILE


class RunLog:
    """Writes a run's records to disk and to the console. A context manager."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        domains: list[str],
        enabled: bool = True,
        resume_step: int | None = None,
        console: Console | None = None,
        verbosity: str = "normal",
    ):
        """folder: the run's folder, made if it is not there.
        total_steps: steps of the whole run, those before a resume included.
        domains: names in the order in which they are shown.
        enabled: False on every rank but 0; every method then does nothing.
        resume_step: the step of the checkpoint from which the run resumes. Records of later steps,
            and of a test, are removed from metrics.jsonl, because they are about to come again.
            None starts a fresh file.
        console: where to write, by default standard output. The bar is shown on a terminal only.
        verbosity: "quiet", "normal" or "verbose". A quiet log shows a test's line alone.

        Entering raises InputError when the folder cannot be written.
        """
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.enabled = enabled
        self._completed = resume_step or 0
        self._steps = 0
        self._activity = ""
        self._domains = list(domains)
        self._resume_step = resume_step
        self._quiet = verbosity == "quiet"
        self._verbose = verbosity == "verbose"
        width = None if sys.stdout.isatty() else WIDTH_IN_A_PIPE
        self._console = console or LogConsole(width=width)

    def __enter__(self) -> "RunLog":
        if not self.enabled:
            return self
        # Words outlive an encoding that has no λ: a log line must never end a run.
        if hasattr(self._console.file, "reconfigure"):
            self._console.file.reconfigure(errors="replace")
        self._lines = LogLines.for_console(
            self._console, self._domains, self.total_steps, self._verbose
        )
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(
                open_metrics(self.folder, self._resume_step)
            )
            for record in read_records(self.folder / METRICS_FILE):
                self._lines.remember(record)
            bar = ProgressBar(
                self._console, self.total_steps, self._completed, self._quiet
            )
            self._bar = stack.enter_context(bar)
            self._started = time.monotonic()
            self._heartbeat = Heartbeat(
                self._say_what_goes_on, not (bar.shown or self._quiet)
            )
            stack.enter_context(self._heartbeat)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self._close.close()

    def train(self, record: dict[str, Any], shown: bool = True) -> None:
        """Logs one training interval.

        record: as the module says, of numbers or 0-dimensional arrays and tensors. shown: on the
        console too.
        """
        if not self.enabled:
            return
        record = self._append({"kind": "train", **record})
        loss = record.get("loss")
        self._bar.show_loss(loss)
        if shown and not self._quiet:
            left = None if self._bar.shown else self._seconds_left()
            line = self._lines.train_line(record, left)
            self._print(line)

    def evaluation(
        self, record: dict[str, Any], best: dict[str, Any] | None = None
    ) -> None:
        """Logs one evaluation; `record` as the module says, `kind` "validation" or "test".

        best: of validations so far, as in `RunState.best`.
        """
        if not self.enabled:
            return
        record = self._append(record)
        if self._quiet and record["kind"] != "test":
            return
        line = self._lines.evaluation_line(record, best)
        self._print(line)
        table = self._lines.domain_table(record)
        if table is not None:
            self._write(table)

    def advance(self, steps: int) -> None:
        """Moves the bar by `steps`."""
        if self.enabled:
            self._bar.advance(steps)
            self._steps += steps
            self._activity = ""

    def show_activity(self, text: str) -> None:
        """Notes what goes on between two steps, for a log that would be silent meanwhile."""
        self._activity = text

    def show_first_step(self) -> None:
        """Says that it was made, where no bar shows it: the longest wait is over."""
        if self.enabled and not (self._bar.shown or self._quiet):
            seconds = time.monotonic() - self._started
            self._activity = f"the first step took {seconds:.3g} s"
            self._say_what_goes_on()
            self._activity = ""

    def _say_what_goes_on(self) -> None:
        """Prints a line where nothing else was printed for a while.

        0:00:40  step 4/30  8.1 s a step, 0:03:30 left
        0:12:10  step 30/30  validation: 1,024 of 2,500 users
        """
        elapsed = time.monotonic() - self._started
        step = self._completed + self._steps
        line = f"{format_duration(elapsed)}  step {step}/{self.total_steps}"
        if self._activity:
            line += f"  {self._activity}"
        elif self._steps:
            pace = elapsed / self._steps
            left = format_duration(self._seconds_left() or 0)
            line += f"  {pace:.3g} s a step, {left} left"
        else:
            line += "  the first step is being made"
        self.message(line)

    def _seconds_left(self) -> float | None:
        """What the rest of the steps takes at the pace so far; None before the first step."""
        if not self._steps:
            return None
        pace = (time.monotonic() - self._started) / self._steps
        return pace * (self.total_steps - self._completed - self._steps)

    def message(self, text: str | RenderableType) -> None:
        """Prints a text letter by letter, or anything that Rich can draw, such as a table."""
        if not self.enabled or self._quiet:
            return
        if not isinstance(text, str):
            self._write(text)
            return
        lines = []
        for line in text.splitlines():
            if line:
                line = escape_name(line)
            lines.append(wrap_message(line, self._console.width))
        escaped = "\n".join(lines)
        self._print(Text(escaped), fold=False)

    def _append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Writes a record, and returns it in Python's own types."""
        seconds = time.monotonic() - self._started
        record = {"seconds": seconds, **plain_record(record)}
        self._lines.remember(record)
        self._file.write(_line(record))
        self._file.flush()
        return record

    def _print(self, text: Text, fold: bool = True) -> None:
        """Prints a line, folded where it is too wide."""
        if fold:
            text = fold_line(text, self._console.width)
        self._write(text, soft_wrap=True, highlight=False)

    def _write(self, content: RenderableType, **options: Any) -> None:
        """Prints. Where nobody reads any more (a closed pipe or terminal), goes on without."""
        self._heartbeat.reset()
        try:
            self._console.print(content, **options)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._console = Console(file=io.StringIO(), width=0, quiet=True)


class LogConsole(Console):
    """A console that goes on without a reader: a log line must never end a run."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None


def open_metrics(folder: Path, resume_step: int | None = None) -> TextIO:
    """Opens a run's metrics.jsonl to append to it. Raises InputError where it cannot be written.

    resume_step: keep the records up to it, without those of a test. None: start a fresh file.
    """
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            return path.open("w", encoding="utf-8")
        _rewind(path, resume_step)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another run folder"
        ) from error


def _rewind(path: Path, resume_step: int) -> None:
    """Removes the records of later steps, and of a test, by an atomic rename. To step 20:

    kind          step
    train         10      stays
    validation    20      stays
    train         30      goes
    test          20      goes
    """
    lines = []
    for record in read_records(path):
        is_later = record["step"] > resume_step
        if is_later or record["kind"] == "test":
            continue
        lines.append(_line(record))
    write_text(path, "".join(lines))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order; none if there is no file.

    A line that is not a whole record (the last one of a run that was killed while it wrote) is
    left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line, parse_constant=_null)
                if _is_record(record):
                    records.append(record)
    return records


def _null(_literal: str) -> None:
    """NaN and Infinity are read as null."""


def _is_record(value: Any) -> bool:
    """Whether a JSON value has what every record has: a kind, and a step that is an integer."""
    if not isinstance(value, dict):
        return False
    step = value.get("step")
    return isinstance(step, int) and "kind" in value


def count_skipped_users(records: list[dict[str, Any]]) -> int:
    """How many users were skipped in training, over all train records.

    A user who is skipped in each epoch counts each time.
    """
    total = 0
    for record in records:
        users = record.get("skipped_users")
        if record["kind"] == "train" and isinstance(users, int):
            total += users
    return total


def median_over_steps(train: list[dict[str, Any]], field: str) -> float | None:
    """The median of a field over the steps of a run; None where no record has it.

    A record stands for the steps since the one before:

        step                1     2     4
        users_per_second    10    20    80      the median of 10, 20, 80, 80 is 80 (the upper one)
    """
    weighted = []
    before = 0
    for record in train:
        steps = max(1, record["step"] - before)
        before = record["step"]
        if record.get(field) is not None:
            weighted.append((record[field], steps))
    weighted.sort()
    half = sum(steps for _, steps in weighted) / 2
    counted = 0
    for value, steps in weighted:
        counted += steps
        if counted > half:
            return float(value)
    return None


def skipped_sentence(users: int) -> str:
    """What a run says at its end of the users that `skipped_users` counts."""
    subject = "1 user was" if users == 1 else f"{users:,} users were"
    return (
        f"{subject} skipped in training, counted anew each epoch: "
        "the data is damaged (stream.damaged=skip)."
    )


def _line(record: dict[str, Any]) -> str:
    """A record as a line of metrics.jsonl."""
    text = json.dumps(record, allow_nan=False)
    return f"{text}\n"


def plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record in Python's own types, as `_plain` makes them."""
    return _plain(record)


def _plain(value: Any) -> Any:
    """Python's own types all the way down; anything that is not a finite number becomes None.

    {"loss": tensor(2.5), "phi": {"Books": nan}} gives {"loss": 2.5, "phi": {"Books": None}}.
    """
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            plain[str(key)] = _plain(item)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
