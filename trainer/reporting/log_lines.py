"""The lines of a run's log on the console: one for each record, and a small table at validations.

    0:03:20  step  50/100  loss 2.5000  NDCG@10 0.2600  12.3k users/s  wait 3%  0:03:20 left
    0:04:00  step  60/100  validation  NDCG@10 0.2700  the best so far
             domain  users  NDCG@10      λ       φ
             Books   1,200   0.3000  0.500  −0.125
             Toys      900   0.2400  1.500  +0.250

A verbose log (`log.console=verbose`) has all figures in every line:

    0:03:20  step  50/100  epoch 0  loss 2.5000  single 2.0000  cross 1.0000  MI 0.5000
             λ φ Books 0.500 -0.125, Toys 1.500 0.250
             12.3k users/s  4.56M tokens/s  wait 3.1%  3.2 GB

That is one line where the console has room for it (trainer.reporting.line_folding).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
    format_signed,
)
from trainer.reporting.line_folding import INDENT, SECTION
from trainer.run_files import HEADLINE

_GREEK = ("λ", "φ")
_ASCII = ("lambda", "phi")
_SIZES = {"G": 1e9, "M": 1e6, "k": 1e3}
_MOST_DOMAINS = 12  # that a line or a table shows
_LOSSES = {
    "loss_single": "single",
    "loss_cross": "cross",
    "mutual_information": "MI",
}


class LogLines:
    """Makes the lines, and keeps what later ones show: the newest validation, λ and φ.

    domains: names, in order. verbose: all figures in every line.
    """

    def __init__(
        self,
        domains: Sequence[str],
        total_steps: int,
        symbols: tuple[str, str] = _GREEK,
        verbose: bool = False,
    ):
        """symbols: how λ and φ are written."""
        self.domains = list(domains)
        self.total_steps = total_steps
        self.symbols = symbols
        self.verbose = verbose
        self._headline: float | None = None
        self._weights: dict[str, float] = {}
        self._gaps: dict[str, float] = {}

    @classmethod
    def for_console(
        cls,
        console: Console,
        domains: Sequence[str],
        total_steps: int,
        verbose: bool = False,
    ) -> "LogLines":
        """Writes λ and φ in letters where the console has no Greek."""
        symbols = _GREEK
        try:
            "".join(_GREEK).encode(console.encoding)
        except (UnicodeEncodeError, LookupError):
            symbols = _ASCII
        return cls(domains, total_steps, symbols, verbose)

    def remember(self, record: Mapping[str, Any]) -> None:
        """Keeps of a record what later lines show; of a run that resumes, all before too."""
        if record["kind"] == "train":
            self._weights = _present(record.get("lambda"))
            self._gaps = _present(record.get("phi"))
        elif record["kind"] == "validation":
            self._headline = (record.get("mean") or {}).get(HEADLINE)

    def train_line(
        self, record: Mapping[str, Any], left: float | None = None
    ) -> Text:
        """One line for a train record.

        A loss that the record does not have is left out, as are a validation that has not been and
        the time left where it is None; any other missing figure is a dash. Users that were skipped
        are named at the end.

        left: seconds that the run still takes.

        0:03:20  step  50/100  loss 2.5000  NDCG@10 0.2600  12.3k users/s  wait 3%  0:03:20 left
        """
        line = self._begin(record)
        if self.verbose:
            line.append(f"epoch {record.get('epoch', 0)}  ", "dim")
        loss = record.get("loss")
        line.append("loss ")
        line.append(format_number(loss), "bold")
        if self.verbose:
            self._append_losses(line, record)
            self._append_transfer(line, record)
            self._append_speed(line, record)
        else:
            self._append_progress(line, record, left)
        skipped = record.get("skipped_users")
        if skipped:
            line.append(f"  {skipped:,} users skipped", "red")
        return line

    def evaluation_line(
        self,
        record: dict[str, Any],
        best: Mapping[str, Any] | None = None,
    ) -> Text:
        """One line for an evaluation record: the mean, and the best validation where it is another.

        best: the step and the figure of the best validation so far.

        0:10:00  step  50/100  validation  NDCG@10 0.2600  the best so far
        0:10:00  step  50/100  validation  NDCG@10 0.2600  best 0.2700 at step 40
        0:12:00  step  40/100  test  NDCG@10 0.2650

        A verbose log has all mean metrics, then NDCG@10 by domain.

        0:10:00  step  50/100  epoch 0  validation  mean  HR@5 0.2500  …  MRR 0.2500
          over users NDCG@10 0.2600  │  NDCG@10 by domain Books 0.3000, Toys 0.2000  │  20 users, 3 too short
        """
        evaluation = Evaluation.from_record(record)
        line = self._begin(record)
        if self.verbose:
            line.append(f"epoch {record.get('epoch', 0)}  ", "dim")
        line.append(evaluation.kind, "bold green")
        if self.verbose:
            self._append_metrics(line, evaluation)
        else:
            mean = evaluation.mean.get(HEADLINE)
            line.append(f"  {HEADLINE} ", "dim")
            line.append(format_number(mean), "bold")
            if best is not None:
                _append_best(line, evaluation, best)
        skipped = evaluation.skipped_users
        if skipped:
            separator = ", " if self.verbose else "  "
            line.append(f"{separator}{skipped:,} skipped", "red")
        return line

    def domain_table(self, record: dict[str, Any]) -> RenderableType | None:
        """The domains of a validation: users, NDCG@10, and the newest λ and φ.

        A φ below 0, negative transfer, is red. Of many domains those with the lowest φ are shown.
        A verbose log has none, as its lines say all of it.

            domain  users  NDCG@10      λ       φ
            Books   1,200   0.3000  0.500  −0.125
            Toys      900   0.2400  1.500  +0.250
        """
        evaluation = Evaluation.from_record(record)
        if self.verbose or evaluation.kind != "validation":
            return None
        figures = {row.name: row for row in evaluation.by_domain}
        known = [domain for domain in self.domains if domain in figures]
        shown = _lowest(known, self._gaps)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.header_style = "dim"
        table.add_column("domain", style="cyan", overflow="ellipsis")
        for name in ("users", HEADLINE, *self._transfer_columns()):
            table.add_column(name, justify="right", no_wrap=True)
        for domain in shown:
            row = figures[domain]
            table.add_row(
                Text(escape_name(domain)),
                f"{row.users:,}",
                format_number(row.headline),
                *self._transfer_cells(domain),
            )
        rest = len(known) - len(shown)
        if rest:
            table.add_row(Text(f"{rest} more", "dim"))
        return Padding(table, (0, 0, 0, len(INDENT)), expand=False)

    def _transfer_columns(self) -> list[str]:
        """λ and φ, where the run has them."""
        weight, gap = self.symbols
        columns = []
        if self._weights:
            columns.append(weight)
        if self._gaps:
            columns.append(gap)
        return columns

    def _transfer_cells(self, domain: str) -> list[Text]:
        """λ and φ of a domain, where the run has them: "0.500" and "−0.125"."""
        cells = []
        if self._weights:
            cells.append(Text(format_number(self._weights.get(domain), ".3f")))
        if self._gaps:
            gap = self._gaps.get(domain)
            cells.append(Text(format_signed(gap), _gap_style(gap)))
        return cells

    def _begin(self, record: Mapping[str, Any]) -> Text:
        """The clock, and the step of all steps: what every line begins with.

        0:03:20  step  50/100
        """
        width = len(str(self.total_steps))
        clock = format_duration(record.get("seconds") or 0)
        step = record["step"]
        line = Text()
        line.append(f"{clock}  ", "dim")
        line.append(f"step {step:>{width}}/{self.total_steps}", "bold")
        line.append("  ")
        return line

    def _append_progress(
        self, line: Text, record: Mapping[str, Any], left: float | None
    ) -> None:
        """The newest validation, the speed, the share of waiting, and the time left."""
        if self._headline is not None:
            line.append(f"  {HEADLINE} ", "dim")
            line.append(format_number(self._headline))
        users = _short_number(record.get("users_per_second"))
        wait = format_number(record.get("data_wait"), ".0%")
        line.append(f"  {users} users/s  wait {wait}")
        if left is not None:
            line.append(f"  {format_duration(left)} left", "dim")

    def _append_losses(self, line: Text, record: Mapping[str, Any]) -> None:
        """The parts of the loss that the run has."""
        for field, label in _LOSSES.items():
            part = record.get(field)
            if part is not None:
                line.append(f"  {label} ", "dim")
                line.append(format_number(part))

    def _append_transfer(self, line: Text, record: Mapping[str, Any]) -> None:
        """λ and φ of each domain that has one of them.

        A run without loss correction has no λ, and its lines show φ alone. A φ below 0, negative
        transfer, is red.

          │  λ φ Books 0.500 -0.125, Toys 0.500 -0.125
        """
        weights = _present(record.get("lambda"))
        gaps = _present(record.get("phi"))
        known = []
        for domain in self.domains:
            if domain in weights or domain in gaps:
                known.append(domain)
        shown = _lowest(known, gaps)
        if shown:
            line.append(SECTION, "dim")
            _, gap_symbol = self.symbols
            head = " ".join(self.symbols) if weights else gap_symbol
            line.append(head, "dim")
        for index, domain in enumerate(shown):
            _append_name(line, index, domain)
            if weights:
                weight = format_number(weights.get(domain), ".3f")
                line.append(f" {weight}")
            gap = gaps.get(domain)
            shown_gap = format_number(gap, "+.3f")
            line.append(f" {shown_gap}", _gap_style(gap))
        _append_rest(line, len(known) - len(shown))

    def _append_speed(self, line: Text, record: Mapping[str, Any]) -> None:
        """Users and tokens per second, the share of the time spent waiting for data, and memory.

        │  12.3k users/s  4.56M tokens/s  wait 3.1%  3.2 GB
        """
        users = _short_number(record.get("users_per_second"))
        tokens = _short_number(record.get("tokens_per_second"))
        wait = format_number(record.get("data_wait"), ".1%")
        memory = format_number(record.get("memory_gb"), ".1f")
        line.append(SECTION, "dim")
        line.append(
            f"{users} users/s  {tokens} tokens/s  wait {wait}  {memory} GB"
        )

    def _append_metrics(self, line: Text, evaluation: Evaluation) -> None:
        """All mean metrics, NDCG@10 by domain, and how many were ranked."""
        line.append("  mean", "dim")
        for metric in evaluation.metrics:
            mean = evaluation.mean.get(metric)
            style = "bold" if metric == HEADLINE else ""
            line.append(f"  {metric} ", "dim")
            line.append(format_number(mean), style)
        line.append(f"  over users {HEADLINE} ", "dim")
        line.append(format_number(evaluation.user_mean_ndcg))
        line.append(SECTION, "dim")
        line.append(f"{HEADLINE} by domain", "dim")
        self._append_headlines(line, evaluation)
        small = len(evaluation.small_domains)
        if small:
            line.append(f" ({small} too small for the mean)", "dim")
        line.append(SECTION, "dim")
        line.append(_count_ranked(evaluation))

    def _append_headlines(self, line: Text, evaluation: Evaluation) -> None:
        """NDCG@10 of each domain that was evaluated: " Books 0.3000, Toys 0.2000"."""
        headlines = {}
        for row in evaluation.by_domain:
            headlines[row.name] = row.headline
        known = [domain for domain in self.domains if domain in headlines]
        shown = known[:_MOST_DOMAINS]
        for index, domain in enumerate(shown):
            figure = format_number(headlines[domain])
            _append_name(line, index, domain)
            line.append(f" {figure}")
        _append_rest(line, len(known) - len(shown))


def _append_best(
    line: Text, evaluation: Evaluation, best: Mapping[str, Any]
) -> None:
    """Which validation is the best so far."""
    if best["step"] == evaluation.step:
        line.append("  the best so far", "green")
        return
    figure = format_number(best[HEADLINE])
    line.append(f"  best {figure} at step {best['step']:,}", "dim")


def _count_ranked(evaluation: Evaluation) -> str:
    """How many were ranked, and who was not.

    20 users, 3 too short
    20 events, 3 without history, 1 of an unseen item      of a split by time
    """
    if evaluation.split is None:
        too_short = evaluation.too_short or 0
        return f"{evaluation.users:,} users, {too_short:,} too short"
    without = evaluation.split["without_history"]
    unseen = sum(evaluation.unseen_by_domain.values())
    return (
        f"{evaluation.users:,} events, {without:,} without history, "
        f"{unseen:,} of an unseen item"
    )


def _lowest(domains: Sequence[str], gaps: Mapping[str, float]) -> list[str]:
    """Those of the lowest φ where there are many, in the order of `domains`.

    Where transfer harms is worth a look; metrics.jsonl has all.
    """
    by_gap = sorted(domains, key=lambda domain: gaps.get(domain, math.inf))
    lowest = set(by_gap[:_MOST_DOMAINS])
    return [domain for domain in domains if domain in lowest]


def _gap_style(gap: float | None) -> str:
    """Negative transfer is red."""
    return "red" if gap is not None and gap < 0 else ""


def _append_name(line: Text, index: int, domain: str) -> None:
    """A domain's name as the one after `index` others."""
    separator = ", " if index else " "
    line.append(separator, "dim")
    line.append(escape_name(domain), "cyan")


def _append_rest(line: Text, count: int) -> None:
    """How many domains a line does not show."""
    if count:
        line.append(f", {count} more", "dim")


def _present(
    by_domain: Mapping[str, float | None] | None,
) -> dict[str, float]:
    """The domains that have a figure.

    {"Books": 0.5, "Toys": None} gives {"Books": 0.5}.
    """
    present = {}
    for domain, value in (by_domain or {}).items():
        if value is not None:
            present[domain] = value
    return present


def _short_number(value: float | None) -> str:
    """Three digits and a letter.

    12345      12.3k
    4560000    4.56M
    """
    if value is None:
        return "–"
    for letter, size in _SIZES.items():
        if value >= size:
            shortened = value / size
            return f"{shortened:.3g}{letter}"
    return f"{value:.3g}"
