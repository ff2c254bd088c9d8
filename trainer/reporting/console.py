"""What all commands show on the console: tables, numbers, names, and a progress bar.

The lines of a run's log are made in trainer.reporting.log_lines. Names come from a person's data, so
nothing in them may steer a terminal.
"""

import math
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
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

from trainer.evaluation.evaluation import (
    WITH_RECENCY,
    DomainFigures,
    Evaluation,
)
from trainer.evaluation.metrics import Figures
from trainer.run_files import HEADLINE

_REFRESH_SECONDS = 0.25
_ROOM_FOR_A_WORD = (
    10  # columns that 80 leave for a name, with two blanks between figures
)


class ProgressBar:
    """The bar of a run's steps, drawn on a terminal only. A context manager.

        loss 2.5000 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸ 50/100 0:03:20 left 0:03:20

    console: where the lines of the log go too; they are printed above the bar. completed: steps
    before a resume. hidden: not on a terminal either.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int,
        completed: int,
        hidden: bool = False,
    ):
        is_terminal = console.is_interactive and console.file.isatty()
        self.shown = is_terminal and not hidden
        self._bar = Progress(
            TextColumn("{task.fields[loss]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            auto_refresh=False,  # no thread beside the training: `advance` draws
            speed_estimate_period=600,
            disable=not self.shown,
        )
        self._total_steps = total_steps
        self._completed = completed

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        self._task = self._bar.add_task(
            "train",
            total=self._total_steps,
            completed=self._completed,
            loss="",
        )
        self._refreshed = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.refresh()
        self._bar.stop()

    def show_loss(self, loss: float | None) -> None:
        """Shows the newest loss beside the bar."""
        figure = format_number(loss, ".4f")
        self._bar.update(self._task, loss=f"loss {figure}")

    def advance(self, steps: int) -> None:
        """Moves the bar, and draws it where the last drawing is some time ago."""
        self._bar.advance(self._task, steps)
        now = time.monotonic()
        waited = now - self._refreshed
        if waited >= _REFRESH_SECONDS:
            self._refreshed = now
            self._bar.refresh()


def evaluation_table(record: dict[str, Any]) -> Table:
    """A table of an evaluation record: a row for each domain, the means, and who was skipped.

    The mean is over the domains that count; below it stands the mean over all users.

    Where the record has popularity's figures, its NDCG@10 and the ratio of the model's to it stand
    beside the model's. It fits 80 columns. With recency popularity the ratio is to that, and the
    table fits 100, as it does with the model's recency term behind.

        Test at step 1,200

                                                                 popular
                             HR      HR    NDCG    NDCG             NDCG
        domain    users      @5     @10      @5     @10     MRR      @10  ratio
        ───────────────────────────────────────────────────────────────────────
        Books        10  0.2500  0.2500  0.2500  0.2500  0.2500   0.1250  ×2.00
        Toys          0       –       –       –       –       –        –      –

        mean         10  0.2500  0.2500  0.2500  0.2500  0.2500   0.1250  ×2.00
        over users   10  0.2500  0.2500  0.2500  0.2500  0.2500   0.1250  ×2.00
    """
    evaluation = Evaluation.from_record(record)
    split = evaluation.kind.capitalize()
    table = new_table(f"{split} at step {evaluation.step:,}")
    table.caption = _caption(evaluation)
    words = " ".join(row.name for row in evaluation.by_domain).split()
    if max(map(len, words), default=0) > _ROOM_FOR_A_WORD:
        # One blank between columns, so that no word of a name is broken.
        table.padding = (0, 0, 0, 0)
    table.add_column(
        "domain",
        overflow="fold",
        vertical="bottom",
    )
    columns = [
        "users",
        *evaluation.metrics,
        *comparison_columns(evaluation),
    ]
    for name in columns:
        style = "bold" if name == HEADLINE else ""
        table.add_column(
            stacked_header(name),
            justify="right",
            no_wrap=True,
            style=style,
        )
    for row in evaluation.by_domain:
        label = Text(escape_name(row.name))
        cells = _domain_cells(evaluation, row)
        table.add_row(label, f"{row.users:,}", *cells)
    table.add_section()
    _add_mean_rows(table, evaluation)
    return table


def _add_mean_rows(table: Table, evaluation: Evaluation) -> None:
    """Adds the mean over the domains that count, and the mean over all users."""
    by_domain, over_users = evaluation.mean_rows("mean", "over users")
    users = evaluation.users - sum(evaluation.small_domains.values())
    cells = _domain_cells(evaluation, by_domain)
    table.add_row(by_domain.name, f"{users:,}", *cells)
    cells = _domain_cells(evaluation, over_users)
    table.add_row(over_users.name, f"{evaluation.users:,}", *cells)


def _caption(evaluation: Evaluation) -> Text | None:
    """What is compared with, which domains the mean leaves out, how many users were not read."""
    lines = split_sentences(evaluation)
    if evaluation.has_recency:
        lines.append(f"{recency_sentence(evaluation)}; the ratio is to it")
    sentence = sentence_on_mean(evaluation)
    if sentence is not None:
        lines.append(sentence[0].upper() + sentence[1:])
    skipped = evaluation.skipped_users
    if skipped:
        lines.append(f"{skipped:,} users could not be read and are left out")
    return Text("\n".join(lines)) if lines else None


def mean_sentence(
    users: Mapping[str, int], counted: Collection[str], least: int
) -> str | None:
    """Which domains the mean is of, where not of all that have users; None otherwise.

    users: evaluated ones, by domain. counted: the names of the domains in the mean. least: the
    users that a domain needs (`evaluation.min_users`).

    the mean is of 2 domains; left out, with fewer than 50 users: Noir (3), War (12)
    no domain has 50 users: the mean is of all 2
    """
    small = []
    for name, count in users.items():
        if count and name not in counted:
            small.append(f"{escape_name(name)} ({count:,})")
    if small:
        domains = "1 domain" if len(counted) == 1 else f"{len(counted)} domains"
        return (
            f"the mean is of {domains}; left out, with fewer than {least:,} "
            f"users: {', '.join(small)}"
        )
    if counted and max(users.values()) < least:
        return (
            f"no domain has {least:,} users: the mean is of all {len(counted)}"
        )
    return None


def sentence_on_mean(evaluation: Evaluation) -> str | None:
    """`mean_sentence` of an evaluation; None for one of an earlier version too."""
    if evaluation.min_users is None:
        return None
    return mean_sentence(
        evaluation.users_by_domain,
        evaluation.mean_domains,
        evaluation.min_users,
    )


def recency_sentence(evaluation: Evaluation) -> str:
    """What recency popularity counts.

    Recent: interactions of the days before, with a half-life of 30 days
    Recent: interactions of the days before the cut, with a half-life of 30 days
    """
    choice = evaluation.recency_choice or {}
    unit = choice.get("unit", "days")
    before = "the days before" if unit == "days" else "the past"
    if (evaluation.split or {}).get("counts") == "cut":
        before += " the cut"
    return (
        f"Recent: interactions of {before}, with a half-life of "
        f"{choice.get('half_life', 'some')} {unit}"
    )


def split_sentence(split: Mapping[str, Any], kind: str) -> str:
    """What is held out by a split by time. kind: validation or test.

    Split by time: trained on what is before 2014-06-01 00:00; of test, from 2014-07-01 00:00 on, the
    first event of each user is ranked
    """
    window = f"from {split['test']} on"
    if kind == "validation":
        window = f"from {split['validation']} to {split['test']}"
    ranked = f"the {split['whose']} event of each user is ranked"
    if split["whose"] == "all":
        ranked = "all events of each user are ranked"
    return (
        f"Split by time: trained on what is before {split['validation']}; "
        f"of {kind}, {window}, {ranked}"
    )


def split_sentences(evaluation: Evaluation) -> list[str]:
    """Of a split by time: its cuts, and the items that training never saw; none of leave-one-out."""
    split = evaluation.split
    if split is None:
        return []
    sentences = [split_sentence(split, evaluation.kind)]
    without = split["without_history"]
    if without:
        sentences.append(
            f"{without:,} events have nothing of their user before them and are left out"
        )
    by_domain = []
    for name, count in evaluation.unseen_by_domain.items():
        if count:
            by_domain.append(f"{escape_name(name)} {count:,}")
    if by_domain:
        sentences.append(
            "Events of an item that training never saw, which do not count: "
            f"{', '.join(by_domain)}"
        )
    return sentences


def comparison_columns(evaluation: Evaluation) -> Iterable[str]:
    """The columns that compare with baselines, where the evaluation has their figures.

    One ratio: to recency popularity where there is that.
    """
    columns = []
    if evaluation.has_popularity:
        columns.append(f"popular {HEADLINE}")
    if evaluation.has_recency:
        columns.append(f"recent {HEADLINE}")
    if columns:
        columns.append("ratio")
    if evaluation.has_compared(WITH_RECENCY):
        columns.append(f"with recency {HEADLINE}")
    return columns


def _domain_cells(evaluation: Evaluation, row: DomainFigures) -> list[str]:
    """The metrics of a row, and the comparison with baselines where the table has one.

    ["0.2500", "0.2500", "0.2500", "0.2500", "0.2500", "0.1250", "×2.00"]
    """
    cells = metric_cells(row.model, evaluation.metrics)
    baselines = []
    if evaluation.has_popularity:
        baselines.append(row.popularity_headline)
    if evaluation.has_recency:
        baselines.append(row.recency_headline)
    for baseline in baselines:
        cells.append(format_number(baseline))
    if baselines:
        cells.append(format_ratio(row.headline, baselines[-1]))
    if evaluation.has_compared(WITH_RECENCY):
        cells.append(format_number(row.with_recency_headline))
    return cells


def metric_cells(figures: Figures, metrics: Iterable[str]) -> list[str]:
    """Metrics as a table shows them: "0.2500", or a dash where there is none."""
    cells = []
    for metric in metrics:
        value = figures.get(metric)
        cells.append(format_number(value))
    return cells


def intervals_by_metric(
    figures: Mapping[str, Any],
) -> dict[str, list[float] | None]:
    """The 95 % intervals of figures that are of a ranking among all items; empty without users."""
    return figures.get("interval") or {}


def new_table(title: str, caption: str | Text | None = None) -> Table:
    """A table in the style of all tables on the console, narrow enough for 80 columns."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def stacked_header(name: str) -> str:
    """A column's name on several lines, so that the column is no wider than its figures.

    popular NDCG@10    popular
                       NDCG
                       @10
    """
    words = name.replace(" ", "\n")
    return words.replace("@", "\n@")


def escape_name(text: str) -> str:
    """A name from a person's data on one line, with nothing in it that steers a terminal."""
    characters = []
    for character in str(text):
        if not character.isprintable():
            character = "\N{REPLACEMENT CHARACTER}"
        characters.append(character)
    escaped = "".join(characters)
    return escaped or "(no name)"


def format_ratio(value: float | None, baseline: float | None) -> str:
    """How many times the baseline a value is: "×3.2", or a dash where that has no meaning."""
    if value is None or not baseline:
        return "–"
    ratio = value / baseline
    return f"×{ratio:.2f}"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with the days before it from one day on.

    200       0:03:20
    90000     1d 1:00:00
    """
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    if days > 0:
        return f"{days}d {clock}"
    return clock


def format_number(value: float | None, form: str = ".4f") -> str:
    """A number for a table, by default as metrics are shown; a dash where there is none.

    value     form     text
    0.25      .4f      0.2500
    -0.125    +.3f     -0.125
    None      .4f      –
    """
    if value is None:
        return "–"
    return format(value, form)


def format_signed(value: float | None, form: str = "+.3f") -> str:
    """A number with its sign, as people write it; a dash where there is none, and for NaN.

    value     form     text
    0.125     +.3f     +0.125
    -0.0312   +.1%     −3.1 %
    None      +.3f     –
    """
    if value is None or math.isnan(value):
        return "–"
    text = format(value, form)
    return text.replace("-", "\N{MINUS SIGN}").replace("%", " %")
