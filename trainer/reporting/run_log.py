"""What a run says while it goes: `metrics.jsonl`, TensorBoard, one console line per record, and a progress bar.

`metrics.jsonl` is the one that lasts. It holds one JSON object a line, a train record per logging interval and a record per
evaluation, in the order in which they happened; `trainer/reporting/run_report.py` draws from it and from nothing else. Its figures:

    train        kind "train", step, epoch, seconds (since the start), loss, loss_single, loss_cross, mutual_information,
                 single_by_domain, cross_by_domain (losses), lambda (weights), phi (eq. 10, below 0 = negative transfer),
                 alpha, beta, learning_rate, gradient_norm, users_per_second, tokens_per_second,
                 skipped_users (over all ranks in the interval: they could not be read, see stream.damaged),
                 data_wait (share of the time, 0 to 1), memory_gb
    evaluation   kind "validation" or "test", step, epoch, seconds, domains {name: {users, HR@5, …, MRR}}, mean {HR@5, …},
                 popularity and popularity_mean (same shapes, optional), too_short (users left out),
                 skipped_users (left out too, as they could not be read)

`seconds` is filled in where a record comes without it. A figure that is missing, infinite or not a number is null, as a NaN
literal would break every JSON reader but Python's.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trainer.errors import InputError
from trainer.run_files import LOOK, METRICS_FILE  # noqa: F401 (others import it here)

HEADLINE = "NDCG@10"
_REFRESH_SECONDS = 0.25
_BY_DOMAIN = ("single_by_domain", "cross_by_domain", "lambda", "phi")
_TENSORBOARD_GROUP = {
    "loss": "loss/total",
    "loss_single": "loss/single",
    "loss_cross": "loss/cross",
    "mutual_information": "loss/mutual_information",
    "alpha": "transfer/alpha",
    "beta": "transfer/beta",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "users_per_second": "speed/users_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "data_wait": "speed/data_wait",
    "memory_gb": "speed/memory_gb",
}


class RunLog:
    """Writes a run's records to disk, to TensorBoard and to the console.

    folder: the run's folder, made if it is not there.
    total_steps: steps of the whole run, those before a resume included.
    domains: names in the order in which they are shown.
    enabled: False on every rank but 0; every method then does nothing.
    resume_step: the step of the checkpoint that the run goes on from. Records of later steps, and of a test, are taken out of
        metrics.jsonl, because they are about to come again. None starts a fresh file.
    console: where to write, by default standard output. The bar is shown on a terminal only.

    Raises InputError when the folder cannot be written or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        domains: list[str],
        tensorboard: bool = True,
        enabled: bool = True,
        resume_step: int | None = None,
        console: Console | None = None,
    ):
        self.folder = Path(folder)
        self.domains = list(domains)
        self.total_steps = total_steps
        self.enabled = enabled
        self._tensorboard_wanted = tensorboard
        self._resume_step = resume_step
        self._console = console or Console(width=None if sys.stdout.isatty() else 120)

    def __enter__(self):
        if not self.enabled:
            return self
        # Words outlive an encoding that has no λ: a log line must never end a run.
        if hasattr(self._console.file, "reconfigure"):
            self._console.file.reconfigure(errors="replace")
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self._open_metrics())
            self._writer = (
                self._open_tensorboard() if self._tensorboard_wanted else None
            )
            if self._writer is not None:
                stack.callback(self._writer.close)
            self._bar = stack.enter_context(self._open_bar())
            self._close = stack.pop_all()
        self._task = self._bar.add_task(
            "train", total=self.total_steps, completed=self._resume_step or 0, loss=""
        )
        self._started = self._refreshed = time.monotonic()
        return self

    def __exit__(self, *exception):
        if self.enabled:
            self._bar.refresh()
            self._close.close()

    def train(self, record: dict) -> None:
        """Logs one training interval; `record` as the module says, numbers or 0-dimensional arrays and tensors."""
        if not self.enabled:
            return
        record = self._append({"kind": "train", **record})
        scalars = {tag: record.get(name) for name, tag in _TENSORBOARD_GROUP.items()}
        for name in _BY_DOMAIN:
            scalars |= {
                f"{name}/{domain}": value
                for domain, value in (record.get(name) or {}).items()
            }
        self._to_tensorboard(scalars, record["step"])
        self._bar.update(self._task, loss=f"loss {number(record.get('loss'), '.4f')}")
        self._print(train_line(record, self.domains, self.total_steps, self._symbols()))

    def evaluation(self, record: dict) -> None:
        """Logs one evaluation; `record` as the module says, `kind` "validation" or "test"."""
        if not self.enabled:
            return
        record = self._append(record)
        scalars = {}
        for metric in metrics_of(record):
            scalars[f"{record['kind']} mean/{metric}"] = record["mean"].get(metric)
            for domain, figures in record["domains"].items():
                scalars[f"{record['kind']} {metric}/{domain}"] = figures.get(metric)
        self._to_tensorboard(scalars, record["step"])
        self._print(evaluation_line(record, self.domains, self.total_steps))

    def advance(self, steps: int) -> None:
        """Moves the bar by `steps`."""
        if not self.enabled:
            return
        self._bar.advance(self._task, steps)
        now = time.monotonic()
        if now - self._refreshed >= _REFRESH_SECONDS:
            self._refreshed = now
            self._bar.refresh()

    def message(self, text: str | RenderableType) -> None:
        """Prints a text as it stands, or anything that Rich can draw, such as `evaluation_table`'s."""
        if not self.enabled:
            return
        if isinstance(text, str):
            self._print(
                Text(
                    "\n".join(
                        printable(line) if line else "" for line in text.splitlines()
                    )
                )
            )
        else:
            self._console.print(text)

    def _open_metrics(self):
        path = self.folder / METRICS_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._resume_step is None:
                return path.open("w", encoding="utf-8")
            kept = [
                record
                for record in read_records(path)
                if record["step"] <= self._resume_step and record["kind"] != "test"
            ]
            temporary = path.with_name(METRICS_FILE + ".new")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another run folder"
            ) from error

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "tensorboard is not installed: install it or switch it off in the config"
            ) from error
        # Events of an earlier attempt stay on disk; purge_step tells TensorBoard from where on they no longer count.
        purge_step = 0 if self._resume_step is None else self._resume_step + 1
        return SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=purge_step, flush_secs=30
        )

    def _open_bar(self):
        return Progress(
            TextColumn("{task.fields[loss]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            auto_refresh=False,  # no thread beside the training: `advance` draws
            speed_estimate_period=600,
            disable=not (self._console.is_interactive and self._console.file.isatty()),
        )

    def _append(self, record):
        record = {"seconds": time.monotonic() - self._started, **_plain(record)}
        self._file.write(_line(record))
        self._file.flush()
        return record

    def _to_tensorboard(self, scalars, step):
        if self._writer is None:
            return
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(printable(tag), value, step)

    def _symbols(self):
        try:
            "λφ".encode(self._console.encoding)
            return "λ", "φ"
        except (UnicodeEncodeError, LookupError):
            return "lambda", "phi"

    def _print(self, text):
        self._console.print(text, soft_wrap=True, highlight=False)


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl in order; none if there is no file.

    A line that is not a whole record (the last one of a run that was killed while it wrote) is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(
                    line, parse_constant=lambda literal: None
                )  # NaN, Infinity
                if (
                    isinstance(record, dict)
                    and isinstance(record.get("step"), int)
                    and "kind" in record
                ):
                    records.append(record)
    return records


def skipped_users(records: list[dict]) -> int:
    """How many users were skipped in training, over all train records; one that is skipped each epoch counts each time."""
    found = (
        record.get("skipped_users") for record in records if record["kind"] == "train"
    )
    return sum(users for users in found if isinstance(users, int))


def skipped_sentence(users: int) -> str:
    """What a run says at its end of the users that `skipped_users` counts."""
    who = "1 user was" if users == 1 else f"{users:,} users were"
    return f"{who} skipped in training, counted anew each epoch: the data is damaged (stream.damaged=skip)."


def metrics_of(record: dict) -> list[str]:
    """The names of an evaluation record's metrics, in its own order."""
    return [name for name in record["mean"] if name != "users"]


def printable(text: str) -> str:
    """A name from a person's data on one line, with nothing in it that steers a terminal."""
    marked = (
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)
    )
    return "".join(marked) or "(no name)"


def train_line(
    record: dict,
    domains: list[str],
    total_steps: int,
    symbols: tuple[str, str] = ("λ", "φ"),
) -> Text:
    """One line for a train record; `symbols`: how λ and φ are written."""
    line = _line_start(record, total_steps)
    line.append("loss ").append(number(record.get("loss")), "bold")
    for name, label in (
        ("loss_single", "single"),
        ("loss_cross", "cross"),
        ("mutual_information", "MI"),
    ):
        if record.get(name) is not None:
            line.append(f"  {label} ", "dim").append(number(record[name]))
    weights, gaps = (
        {
            domain: value
            for domain, value in (record.get(name) or {}).items()
            if value is not None
        }
        for name in ("lambda", "phi")
    )
    shown = [domain for domain in domains if domain in weights or domain in gaps]
    if shown:
        line.append("  │  ", "dim").append(
            " ".join(symbols) if weights else symbols[1], "dim"
        )
    for position, domain in enumerate(shown):
        line.append(", " if position else " ", "dim").append(printable(domain), "cyan")
        if weights:
            line.append(" " + number(weights.get(domain), ".3f"))
        gap = gaps.get(domain)
        line.append(
            " " + number(gap, "+.3f"), "red" if gap is not None and gap < 0 else ""
        )
    line.append("  │  ", "dim")
    users, tokens = (
        _short(record.get("users_per_second")),
        _short(record.get("tokens_per_second")),
    )
    wait, memory = (
        number(record.get("data_wait"), ".1%"),
        number(record.get("memory_gb"), ".1f"),
    )
    line.append(f"{users} users/s  {tokens} tokens/s  wait {wait}  {memory} GB")
    if record.get("skipped_users"):
        line.append(f"  {record['skipped_users']:,} users skipped", "red")
    return line


def evaluation_line(record: dict, domains: list[str], total_steps: int) -> Text:
    """One line for an evaluation record: the means of all metrics, then the headline metric per domain."""
    line = _line_start(record, total_steps)
    line.append(record["kind"], "bold green").append("  mean", "dim")
    for metric in metrics_of(record):
        line.append(f"  {metric} ", "dim")
        line.append(
            number(record["mean"].get(metric)), "bold" if metric == HEADLINE else ""
        )
    line.append("  │  ", "dim").append(f"{HEADLINE} by domain", "dim")
    for position, domain in enumerate(
        domain for domain in domains if domain in record["domains"]
    ):
        line.append(", " if position else " ", "dim").append(printable(domain), "cyan")
        line.append(" " + number(record["domains"][domain].get(HEADLINE)))
    users = sum(figures.get("users") or 0 for figures in record["domains"].values())
    line.append("  │  ", "dim").append(
        f"{users:,} users, {record.get('too_short') or 0:,} too short"
    )
    if record.get("skipped_users"):
        line.append(f", {record['skipped_users']:,} skipped", "red")
    return line


def evaluation_table(record: dict) -> Table:
    """A table of an evaluation record: a row per domain and one of means, and below them how many users were skipped.

    When the record has popularity's figures, its NDCG@10 and the ratio of the model's to it stand beside them.
    """
    metrics = metrics_of(record)
    popularity, popularity_mean = (
        record.get("popularity"),
        record.get("popularity_mean") or {},
    )
    title = f"{record['kind'].capitalize()} at step {record['step']:,}"
    style = {
        "box": box.SIMPLE_HEAD,
        "padding": (0, 1, 0, 0),
        "pad_edge": False,
    }  # fits 80 columns
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        **style,
    )
    if record.get("skipped_users"):
        table.caption = (
            f"{record['skipped_users']:,} users could not be read and are left out"
        )
    table.add_column("domain", overflow="fold", vertical="bottom")
    for name in (
        "users",
        *metrics,
        *((f"popular {HEADLINE}", "ratio") if popularity else ()),
    ):
        header = name.replace(" ", "\n").replace("@", "\n@")
        table.add_column(
            header,
            justify="right",
            no_wrap=True,
            style="bold" if name == HEADLINE else "",
        )

    def cells(figures, baseline):
        own = [number(figures.get(metric)) for metric in metrics]
        if not popularity:
            return own
        return [
            *own,
            number(baseline.get(HEADLINE)),
            times(figures.get(HEADLINE), baseline.get(HEADLINE)),
        ]

    for domain, figures in record["domains"].items():
        baseline = (popularity or {}).get(domain) or {}
        table.add_row(
            Text(printable(domain)),
            f"{figures.get('users') or 0:,}",
            *cells(figures, baseline),
        )
    table.add_section()
    users = sum(figures.get("users") or 0 for figures in record["domains"].values())
    table.add_row("mean", f"{users:,}", *cells(record["mean"], popularity_mean))
    return table


def times(value: float | None, baseline: float | None) -> str:
    """How many times the baseline a value is, in words for a table: "×3.2", or a dash where that has no meaning."""
    if value is None or not baseline:
        return "–"
    return f"×{value / baseline:.2f}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with the days before it from one day on."""
    seconds = int(seconds)
    clock = f"{seconds % 86400 // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
    return clock if seconds < 86400 else f"{seconds // 86400}d {clock}"


def _line_start(record, total_steps):
    width = len(str(total_steps))
    step = f"step {record['step']:>{width}}/{total_steps}"
    line = Text()
    line.append(duration(record.get("seconds") or 0) + "  ", "dim").append(step, "bold")
    return line.append(f"  epoch {record.get('epoch', 0)}  ", "dim")


def number(value: float | None, form=".4f") -> str:
    """A number for a table, by default as metrics are shown; a dash where there is none."""
    return "–" if value is None else format(value, form)


def _short(value):
    if value is None:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _line(record):
    return json.dumps(record, allow_nan=False) + "\n"


def _plain(value):
    """Python's own types all the way down; anything that is not a finite number becomes None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
