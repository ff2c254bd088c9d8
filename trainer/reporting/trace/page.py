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
from trainer.reporting.trace.records import RankPhases, read_phases
from trainer.reporting.trace.waiting import (
    Wait,
    WaitingTimes,
    align_clocks,
    common_steps,
    find_waits,
    step_seconds,
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
_LEGEND_BELOW = 64
_SHORTEST = 1e-9  # seconds
_WAITS = "waits"
_WAITS_LINE = {
    "width": 0.5,
    "color": GREY,
}
_HATCH = {
    "shape": "/",
    "fgcolor": INK,
    "solidity": 0.12,
    "size": 5,
}
_DEVICE_SENTENCE = (
    "Times are the host's, which runs ahead of the device: a phase is the time in which its work was "
    "queued, or the host waited. profile.steps traces the device."
)
_PHASES_SENTENCE = (
    "Milliseconds of a step, without what is between two. An exchange (ids, rows, gradients, sums, "
    "table) has the waiting for other ranks in it, which the last column sums."
)
_PAIRS_SENTENCE = (
    "Milliseconds of a step that the rank of a row waits for that of a column."
)
_PICTURE_SENTENCE = (
    "A row a rank. Hatched: the rank waits for the one that comes last to an exchange. "
    "Click a phase in the legend to hide it."
)


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
            _PICTURE_SENTENCE,
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
    ranks: Sequence[RankPhases],
    steps: list[int],
    times: WaitingTimes,
) -> list[str]:
    """What the page says first."""
    hosts = {rank.host for rank in ranks}
    host_words = f"{len(hosts)} hosts"
    if len(hosts) == 1:
        host_words = ranks[0].host
    rank_words = f"{len(ranks)} ranks"
    if len(ranks) == 1:
        rank_words = "1 rank"
    total = sum(times.seconds)
    mean = total / len(ranks)
    milliseconds = times.milliseconds(mean)
    lead = [
        f"{rank_words} on {host_words}. The tables are of {times.steps:,} steps "
        f"({steps[0]:,} to {steps[-1]:,}), which took {milliseconds:.1f} ms each."
    ]
    if ranks[0].device != "cpu":
        lead.append(_DEVICE_SENTENCE)
    if len(ranks) > 1:
        lead.append(_waiting_sentence(times))
    return lead


def _waiting_sentence(times: WaitingTimes) -> str:
    """Who waits most, and for whom."""
    ranks = range(len(times.seconds))
    waiting = max(ranks, key=times.waits)
    late = max(ranks, key=times.delays)
    total = sum(map(times.waits, ranks))
    if not total:
        return "No rank waits for another one."
    waits = times.waits(waiting) / times.seconds[waiting]
    share = times.delays(late) / total
    return (
        f"Rank {waiting} waits most, {waits:.0%} of its time. Of all waiting, "
        f"{share:.0%} is for rank {late}."
    )


def _tables(
    ranks: Sequence[RankPhases],
    times: WaitingTimes,
) -> list[Table]:
    """Phases by rank, and who waits for whom."""
    tables = [_phase_table(ranks, times)]
    if 1 < len(ranks) <= _MOST_RANKS:
        tables.append(_pair_table(times))
    return tables


def _phase_table(
    ranks: Sequence[RankPhases],
    times: WaitingTimes,
) -> Table:
    """The milliseconds of a step in each phase, by rank."""
    phases = _long_phases(times)
    rows = []
    for number, rank in enumerate(ranks):
        by_phase = times.by_phase[number]
        name = f"{rank.rank} ({rank.host})"
        cells = [
            Cell(name),
            _milliseconds(times, times.seconds[number]),
        ]
        for phase in phases:
            seconds = by_phase.get(phase, 0.0)
            cells.append(_milliseconds(times, seconds))
        waits = times.waits(number)
        cells.append(_milliseconds(times, waits))
        rows.append(cells)
    columns = [
        "rank",
        "step",
        *phases,
        _WAITS,
    ]
    return Table(
        title="Phases",
        text=_PHASES_SENTENCE,
        columns=columns,
        rows=rows,
    )


def _long_phases(times: WaitingTimes) -> list[str]:
    """The phases that take a share of the time on any rank."""
    longest = max(times.seconds)
    phases = []
    for phase in PHASES:
        most = 0.0
        for by_phase in times.by_phase:
            most = max(most, by_phase.get(phase, 0.0))
        if most > _LEAST_SHARE * longest:
            phases.append(phase)
    return phases


def _pair_table(times: WaitingTimes) -> Table:
    """Milliseconds of a step that a rank (row) waits for another (column)."""
    ranks = range(len(times.seconds))
    columns = [""]
    rows = []
    for rank in ranks:
        columns.append(f"for rank {rank}")
        cells = [Cell(f"rank {rank} waits")]
        for other in ranks:
            cell = Cell("–")
            if rank != other:
                seconds = times.waited.get((rank, other), 0.0)
                cell = _milliseconds(times, seconds)
            cells.append(cell)
        rows.append(cells)
    return Table(
        title="Who waits for whom",
        text=_PAIRS_SENTENCE,
        columns=columns,
        rows=rows,
    )


def _milliseconds(times: WaitingTimes, seconds: float) -> Cell:
    milliseconds = times.milliseconds(seconds)
    return Cell(f"{milliseconds:.2f}")


@dataclass(frozen=True)
class _Bar:
    """A part of a rank's row. begin, length: in milliseconds of the picture."""

    row: str
    begin: float
    length: float
    text: str


def _timeline(ranks: Sequence[RankPhases], window: StepWindow) -> go.Figure:
    """A row a rank, a bar a phase; waiting is hatched."""
    bars: dict[str, list[_Bar]] = defaultdict(list)
    for step in window.steps:
        waits = find_waits(ranks, step)
        for rank in ranks:
            _add_step(bars, rank, step, waits, window)
    figure = go.Figure()
    for number, phase in enumerate((*PHASES, _WAITS)):
        if bars[phase]:
            marker = _marker(phase, number)
            _draw_bars(figure, phase, marker, bars[phase])
    _finish_timeline(figure, ranks)
    for step in window.steps:
        begin = min(_begin_of_step(rank, step) for rank in ranks)
        moment = window.milliseconds(begin)
        _mark_step(figure, step, moment)
    return figure


def _add_step(
    bars: dict[str, list[_Bar]],
    rank: RankPhases,
    step: int,
    waits: list[Wait],
    window: StepWindow,
) -> None:
    """Adds the bars of a rank's step: of each span what is waiting, and the rest."""
    waits_by_begin = {}
    for wait in waits:
        if wait.rank == rank.rank:
            waits_by_begin[wait.begin] = wait
    row = _row_name(rank)
    for span in rank.steps[step]:
        begin = span.begin
        wait_of_span = waits_by_begin.get(span.begin)
        if wait_of_span is not None and wait_of_span.phase == span.phase:
            begin = wait_of_span.end
            length = 1000 * wait_of_span.seconds
            bar = _Bar(
                row,
                window.milliseconds(span.begin),
                length,
                f"step {step}: waits {length:.2f} ms "
                f"for rank {wait_of_span.other} ({span.phase})",
            )
            bars[_WAITS].append(bar)
        length = 1000 * (span.end - begin)
        bar = _Bar(
            row,
            window.milliseconds(begin),
            length,
            f"step {step}: {span.phase} {length:.2f} ms",
        )
        bars[span.phase].append(bar)


def _row_name(rank: RankPhases) -> str:
    return f"rank {rank.rank}"


def _marker(phase: str, number: int) -> dict[str, object]:
    """The colour of a phase's bars, as Plotly takes it."""
    if phase == _WAITS:
        return {
            "color": PAPER,
            "pattern": _HATCH,
            "line": _WAITS_LINE,
        }
    colour = DOMAINS[number % len(DOMAINS)]
    if phase == BETWEEN:
        colour = GRID
    return {"color": colour, "line": {"width": 0}}


def _draw_bars(
    figure: go.Figure,
    phase: str,
    marker: dict[str, object],
    bars: list[_Bar],
) -> None:
    """Draws the bars of a phase."""
    rows = []
    begins = []
    lengths = []
    texts = []
    for bar in bars:
        rows.append(bar.row)
        begins.append(round(bar.begin, 3))
        lengths.append(round(bar.length, 3))
        texts.append(bar.text)
    figure.add_bar(
        orientation="h",
        name=phase,
        y=rows,
        base=begins,
        x=lengths,
        hovertext=texts,
        hoverinfo="text",
        marker=marker,
    )


def _finish_timeline(
    figure: go.Figure,
    ranks: Sequence[RankPhases],
) -> None:
    """The axes and the legend; the first rank is on top."""
    rows = []
    for rank in ranks:
        rows.append(_row_name(rank))
    rows.reverse()
    height = _ROW_HEIGHT * len(ranks)
    legend = {
        "orientation": "h",
        "y": -_LEGEND_BELOW / (_LEGEND_BELOW + height),
    }
    figure.update_layout(
        barmode="overlay",
        bargap=0.25,
    )
    finish_figure(
        figure,
        height + 2 * _LEGEND_BELOW,
        hovermode="closest",
        legend=legend,
    )
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=rows,
        title=None,
    )
    figure.update_xaxes(
        title={"text": "milliseconds"},
        dtick=None,
        nticks=12,
    )


def _begin_of_step(rank: RankPhases, step: int) -> float:
    """When a step began: what is before it in its line is between two steps."""
    first = rank.steps[step][0]
    if first.phase == BETWEEN:
        return first.end
    return first.begin


def _mark_step(figure: go.Figure, step: int, moment: float) -> None:
    """An upright at the begin of a step, with its number above."""
    line = {
        "color": GREY,
        "width": 1,
        "dash": "dot",
    }
    font = {
        "size": 11,
        "color": GREY,
    }
    figure.add_vline(x=moment, line=line)
    figure.add_annotation(
        x=moment,
        y=1,
        yref="paper",
        yanchor="bottom",
        xanchor="left",
        showarrow=False,
        text=f"step {step:,}",
        font=font,
    )


def _waiting_plot(
    ranks: Sequence[RankPhases],
    steps: list[int],
) -> go.Figure | None:
    """The share of each step that a rank waits; only of those that wait most, where there are many."""
    if len(ranks) < 2 or len(steps) < 2:
        return None
    shares_RS = _waiting_shares(ranks, steps)
    means_R = shares_RS.mean(1)
    most = np.argsort(-means_R, kind="stable")[:_MOST_LINES]
    step_numbers = np.array(steps)
    points = points_per_line(len(most))
    figure = go.Figure()
    for number in sorted(most):
        thinned, values = thin(step_numbers, shares_RS[number], points)
        colour = DOMAINS[number % len(DOMAINS)]
        figure.add_scatter(
            x=thinned.astype(np.int32),
            y=values.astype(np.float32),
            mode="lines",
            name=_row_name(ranks[number]),
            line={"width": 2, "color": colour},
        )
    figure.update_yaxes(tickformat="~%", rangemode="tozero")
    return finish_figure(figure, 300, "share of a step")


def _waiting_shares(
    ranks: Sequence[RankPhases],
    steps: list[int],
) -> np.ndarray:
    """The share of each step that a rank waits, (ranks, steps)."""
    shape = (len(ranks), len(steps))
    waits_RS = np.zeros(shape)
    lengths_RS = np.zeros(shape)
    for place, step in enumerate(steps):
        for wait in find_waits(ranks, step):
            waits_RS[wait.rank, place] += wait.seconds
        for number, rank in enumerate(ranks):
            lengths_RS[number, place] = step_seconds(rank, step)
    return waits_RS / np.maximum(lengths_RS, _SHORTEST)
