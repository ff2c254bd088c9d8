"""`trace.html`: what all ranks did in some steps, and who waited for whom.

It is drawn from the ranks' phases (trainer.reporting.trace.records), and can be drawn while the run
trains. Plotly's JavaScript stands in the page, as in a run's report.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from trainer.errors import InputError
from trainer.files.atomic import write_text
from trainer.reporting.colours import DOMAINS, GREY, GRID, INK, PAPER
from trainer.reporting.html import (
    Cell,
    Section,
    Table,
    page_title,
    render_sections,
    render_table_page,
)
from trainer.reporting.plots import finish_figure, points_per_line, thin
from trainer.reporting.trace.phases import BETWEEN, PHASES
from trainer.reporting.trace.records import RankPhases, Span, read_phases
from trainer.reporting.trace.waiting import (
    Wait,
    WaitingTimes,
    align_clocks,
    common_steps,
    find_waits,
    sum_times,
)
from trainer.run_files import PHASES_FOLDER, TRACE

MOST_STEPS = 50  # in the picture
_DEFAULT_STEPS = 4
_WARM_UP = 5  # steps that do not count in the tables, where there are many more
_MOST_RANKS = 12  # in the table of pairs
_MOST_LINES = 12
_ROW_HEIGHT = 34  # pixels
_LEAST_SHARE = 0.005  # of the time; below it a phase is not in the table
_WAITS = "waits"
_HATCH = {"shape": "/", "fgcolor": INK, "solidity": 0.12, "size": 5}


@dataclass(frozen=True)
class StepWindow:
    """The steps of the picture. begin: when the first of them began, Unix time."""

    steps: list[int]
    begin: float

    def milliseconds(self, moment: float) -> float:
        """A moment in the picture's own time."""
        return 1000 * (moment - self.begin)


def write_trace(
    run: Path, window: tuple[int, int] | None = None, output: Path | None = None
) -> Path:
    """Draws the picture of a run's phases and returns its path.

    window: the first and last step in it; None: the last few. output: another file than
    RUN/trace.html. Raises InputError where there are no phases, or none of those steps.
    """
    ranks = align_clocks(read_phases(run))
    steps = common_steps(ranks)
    if not steps:
        raise InputError(
            f"{run / PHASES_FOLDER}: has no step that all {len(ranks)} ranks have made: "
            "wait until one is written (every 10 s)"
        )
    shown = _choose_window(run, ranks, steps, window)
    counted = steps[_WARM_UP:] if len(steps) > 2 * _WARM_UP else steps
    times = sum_times(ranks, counted)
    sections: list[Section] = [
        (
            f"Steps {shown.steps[0]:,} to {shown.steps[-1]:,}",
            "A row a rank. Hatched: the rank waits for the one that comes last to an exchange. "
            "Click a phase in the legend to hide it.",
            _timeline(ranks, shown),
        ),
        (
            "Waiting over the run",
            "The share of each step in which a rank waits for another one.",
            _waiting_plot(ranks, steps),
        ),
    ]
    text = render_table_page(
        page_title(run),
        "trace",
        _lead(ranks, counted, times),
        _tables(ranks, times),
        render_sections(sections),
        {},
    )
    file = output or run / TRACE
    write_text(file, text)
    return file


def _choose_window(
    run: Path,
    ranks: Sequence[RankPhases],
    steps: list[int],
    window: tuple[int, int] | None,
) -> StepWindow:
    """The steps to draw."""
    chosen = steps[-_DEFAULT_STEPS:]
    if window is not None:
        first, last = window
        chosen = [step for step in steps if first <= step <= last]
        if not chosen:
            raise InputError(
                f"{run / PHASES_FOLDER}: has none of the steps {first}-{last}: "
                f"give some of {steps[0]}-{steps[-1]}"
            )
        if len(chosen) > MOST_STEPS:
            raise InputError(
                f"--steps {first}-{last} are {len(chosen)}: give at most {MOST_STEPS}"
            )
    begins = [rank.steps[chosen[0]][0].begin for rank in ranks]
    return StepWindow(chosen, min(begins))


def _lead(
    ranks: Sequence[RankPhases], steps: list[int], times: WaitingTimes
) -> list[str]:
    """What the page says first."""
    hosts = sorted({rank.host for rank in ranks})
    host_words = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    rank_words = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    mean = 1000 * np.mean(times.seconds) / times.steps
    lead = [
        f"{rank_words} on {host_words}. The tables are of {times.steps:,} steps "
        f"({steps[0]:,} to {steps[-1]:,}), which took {mean:.1f} ms each."
    ]
    if ranks[0].device != "cpu":
        lead.append(
            "Times are the host's, which runs ahead of the device: a phase is the time in which its "
            "work was queued, or the host waited. profile.steps traces the device."
        )
    if len(ranks) > 1:
        lead.append(_waiting_sentence(times))
    return lead


def _waiting_sentence(times: WaitingTimes) -> str:
    """Who waits most, and for whom."""
    ranks = range(len(times.seconds))
    waiting = max(ranks, key=times.waits)
    late = max(ranks, key=times.delays)
    waits = times.waits(waiting) / times.seconds[waiting]
    total = sum(map(times.waits, ranks))
    if not total:
        return "No rank waits for another one."
    share = times.delays(late) / total
    return (
        f"Rank {waiting} waits most, {waits:.0%} of its time. Of all waiting, "
        f"{share:.0%} is for rank {late}."
    )


def _tables(ranks: Sequence[RankPhases], times: WaitingTimes) -> list[Table]:
    """Phases by rank, and who waits for whom."""
    tables = [_phase_table(ranks, times)]
    if 1 < len(ranks) <= _MOST_RANKS:
        tables.append(_pair_table(times))
    return tables


def _phase_table(ranks: Sequence[RankPhases], times: WaitingTimes) -> Table:
    """The milliseconds of a step in each phase, by rank."""
    phases = []
    total = sum(times.seconds)
    for phase in PHASES:
        seconds = sum(by_phase.get(phase, 0.0) for by_phase in times.by_phase)
        if seconds > _LEAST_SHARE * total:
            phases.append(phase)
    rows = []
    for number, rank in enumerate(ranks):
        cells = [Cell(f"{rank.rank} ({rank.host})")]
        cells.append(_milliseconds(times.seconds[number], times))
        for phase in phases:
            seconds = times.by_phase[number].get(phase, 0.0)
            cells.append(_milliseconds(seconds, times))
        cells.append(_milliseconds(times.waits(number), times))
        rows.append(cells)
    text = (
        "Milliseconds of a step. An exchange (ids, rows, gradients, sums, table) has the waiting "
        "for other ranks in it, which the last column sums."
    )
    return Table("Phases", text, ["rank", "step", *phases, _WAITS], rows)


def _pair_table(times: WaitingTimes) -> Table:
    """Milliseconds of a step that a rank (row) waits for another (column)."""
    ranks = range(len(times.seconds))
    rows = []
    for rank in ranks:
        cells = [Cell(f"rank {rank} waits")]
        for other in ranks:
            seconds = times.waited.get((rank, other), 0.0)
            same = rank == other
            cells.append(Cell("–") if same else _milliseconds(seconds, times))
        rows.append(cells)
    columns = ["", *[f"for rank {rank}" for rank in ranks]]
    text = "Milliseconds of a step that the rank of a row waits for that of a column."
    return Table("Who waits for whom", text, columns, rows)


def _milliseconds(seconds: float, times: WaitingTimes) -> Cell:
    return Cell(f"{1000 * seconds / times.steps:.2f}")


def _timeline(ranks: Sequence[RankPhases], window: StepWindow) -> go.Figure:
    """A row a rank, a bar a phase; waiting is hatched."""
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    for step in window.steps:
        waits = find_waits(ranks, step)
        for rank in ranks:
            own = [wait for wait in waits if wait.rank == rank.rank]
            for span in rank.steps[step]:
                _add_bars(bars, rank.rank, step, span, own, window)
    figure = go.Figure()
    for number, phase in enumerate((*PHASES, _WAITS)):
        if bars[phase]:
            figure.add_bar(**_bar_trace(phase, number, bars[phase]))
    figure.update_layout(barmode="overlay", bargap=0.25)
    names = [f"rank {rank.rank}" for rank in ranks]
    finish_figure(
        figure,
        130 + _ROW_HEIGHT * len(ranks),
        hovermode="closest",
        legend={"orientation": "h", "y": -60 / (60 + _ROW_HEIGHT * len(ranks))},
    )
    figure.update_yaxes(
        categoryorder="array", categoryarray=names[::-1], title=None
    )
    figure.update_xaxes(
        title={"text": "milliseconds"}, tickformat=",~f", dtick=None, nticks=12
    )
    for step in window.steps:
        begin = min(_begin_of_step(rank, step) for rank in ranks)
        _mark_step(figure, step, window.milliseconds(begin))
    return figure


def _add_bars(
    bars: dict[str, list[tuple[str, float, float, str]]],
    rank: int,
    step: int,
    span: Span,
    waits: list[Wait],
    window: StepWindow,
) -> None:
    """Adds a span's bars: what of it is waiting, and the rest."""
    row = f"rank {rank}"
    begin = span.begin
    for wait in waits:
        if wait.phase == span.phase and wait.begin == span.begin:
            text = (
                f"step {step}: waits {1000 * wait.seconds:.2f} ms "
                f"for rank {wait.other} ({span.phase})"
            )
            length = 1000 * wait.seconds
            bars[_WAITS].append(
                (row, window.milliseconds(wait.begin), length, text)
            )
            begin = wait.end
    length = 1000 * (span.end - begin)
    text = f"step {step}: {span.phase} {length:.2f} ms"
    bars[span.phase].append((row, window.milliseconds(begin), length, text))


def _bar_trace(
    phase: str, number: int, bars: list[tuple[str, float, float, str]]
) -> dict[str, object]:
    """The options of a phase's bars."""
    rows, begins, lengths, texts = zip(*bars, strict=True)
    marker: dict[str, object] = {"color": DOMAINS[number % len(DOMAINS)]}
    if phase == BETWEEN:
        marker = {"color": GRID}
    if phase == _WAITS:
        marker = {"color": PAPER, "pattern": _HATCH}
    marker["line"] = {"width": 0}
    if phase == _WAITS:
        marker["line"] = {"width": 0.5, "color": GREY}
    return {
        "orientation": "h",
        "name": phase,
        "y": list(rows),
        "base": np.round(begins, 3),
        "x": np.round(lengths, 3),
        "hovertext": list(texts),
        "hoverinfo": "text",
        "marker": marker,
    }


def _begin_of_step(rank: RankPhases, step: int) -> float:
    """When a step began: what is before it in its line is between two steps."""
    spans = rank.steps[step]
    if spans[0].phase == BETWEEN:
        return spans[0].end
    return spans[0].begin


def _mark_step(figure: go.Figure, step: int, moment: float) -> None:
    """An upright at the begin of a step, with its number above."""
    line = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_vline(x=moment, line=line)
    figure.add_annotation(
        x=moment,
        y=1,
        yref="paper",
        yanchor="bottom",
        xanchor="left",
        showarrow=False,
        text=f"step {step:,}",
        font={"size": 11, "color": GREY},
    )


def _waiting_plot(
    ranks: Sequence[RankPhases], steps: list[int]
) -> go.Figure | None:
    """The share of each step that a rank waits; only of those that wait most, where there are many."""
    if len(ranks) < 2 or len(steps) < 2:
        return None
    shares_RS = np.zeros((len(ranks), len(steps)))
    for place, step in enumerate(steps):
        for wait in find_waits(ranks, step):
            shares_RS[wait.rank, place] += wait.seconds
        for number, rank in enumerate(ranks):
            whole = sum(span.seconds for span in rank.steps[step])
            shares_RS[number, place] /= whole or 1.0
    most = np.argsort(-shares_RS.mean(1), kind="stable")[:_MOST_LINES]
    figure = go.Figure()
    step_numbers = np.array(steps)
    for number in sorted(most):
        thinned, values = thin(
            step_numbers, shares_RS[number], points_per_line(len(most))
        )
        figure.add_scatter(
            x=thinned.astype(np.int32),
            y=values.astype(np.float32),
            mode="lines",
            name=f"rank {ranks[number].rank}",
            line={"width": 2, "color": DOMAINS[number % len(DOMAINS)]},
        )
    figure.update_yaxes(tickformat="~%", rangemode="tozero")
    return finish_figure(figure, 300, "share of a step")
