"""Who waits for whom: from the phases of all ranks.

An exchange with all ranks (a sum, an all-to-all) goes on when the last rank has come to it. So a rank
that comes earlier waits for that one:

    rank 0    forward         sums        backward
    rank 1    forward                     sums backward
                              |―――――――――――|
                              rank 0 waits for rank 1
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.reporting.trace.phases import BETWEEN, EXCHANGES, SUMS
from trainer.reporting.trace.records import RankPhases, Span


@dataclass(frozen=True)
class Wait:
    """A rank that waits in a phase for another one. begin, end: Unix time, in seconds."""

    rank: int
    other: int
    phase: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def common_steps(ranks: Sequence[RankPhases]) -> list[int]:
    """The steps that all ranks have recorded, rising."""
    steps = set(ranks[0].steps)
    for rank in ranks[1:]:
        steps &= set(rank.steps)
    return sorted(steps)


def align_clocks(ranks: Sequence[RankPhases]) -> list[RankPhases]:
    """The phases by the clock of the first rank's host.

    All ranks leave the last sum of a step at one time. So the median difference between the times
    at which two hosts leave it is the difference of their clocks.
    """
    steps = common_steps(ranks)
    first_host = ranks[0].host
    by_host: dict[str, list[float]] = defaultdict(list)
    for rank in ranks:
        if rank.host != first_host:
            by_host[rank.host] += _differences(ranks[0], rank, steps)
    aligned = []
    for rank in ranks:
        differences = by_host[rank.host]
        shift = statistics.median(differences) if differences else 0.0
        aligned.append(_shifted(rank, shift))
    return aligned


def _differences(
    first: RankPhases,
    other: RankPhases,
    steps: list[int],
) -> list[float]:
    """By how much a rank's clock is ahead of the first one's, at the end of each step's last sum."""
    differences = []
    for step in steps:
        first_sums = _spans_of(first, step, SUMS)
        other_sums = _spans_of(other, step, SUMS)
        if first_sums and other_sums:
            first_end = first_sums[-1].end
            other_end = other_sums[-1].end
            differences.append(other_end - first_end)
    return differences


def _shifted(rank: RankPhases, shift: float) -> RankPhases:
    """A rank's phases, earlier by so many seconds."""
    if not shift:
        return rank
    steps = {}
    for step, spans in rank.steps.items():
        moved = []
        for span in spans:
            begin = span.begin - shift
            end = span.end - shift
            moved.append(Span(span.phase, begin, end))
        steps[step] = moved
    return replace(rank, steps=steps)


def _spans_of(rank: RankPhases, step: int, phase: str) -> list[Span]:
    """The spans of a phase in a step."""
    spans = []
    for span in rank.steps[step]:
        if span.phase == phase:
            spans.append(span)
    return spans


def step_seconds(rank: RankPhases, step: int) -> float:
    """How long a step took a rank, without what is between two steps."""
    seconds = 0.0
    for span in rank.steps[step]:
        if span.phase != BETWEEN:
            seconds += span.seconds
    return seconds


def find_waits(ranks: Sequence[RankPhases], step: int) -> list[Wait]:
    """All waits of a step, in phases that are an exchange.

    A phase that the ranks do not have equally often is passed over: nobody knows which belongs to
    which.
    """
    waits = []
    for phase in EXCHANGES:
        by_rank = []
        counts = set()
        for rank in ranks:
            spans = _spans_of(rank, step, phase)
            by_rank.append(spans)
            counts.add(len(spans))
        if len(counts) > 1:
            continue
        for exchange in zip(*by_rank, strict=True):
            waits += _waits_of_exchange(phase, exchange)
    return waits


def _waits_of_exchange(phase: str, spans: Sequence[Span]) -> list[Wait]:
    """The waits of one exchange. spans: of each rank."""
    last = 0
    for rank, span in enumerate(spans):
        if span.begin > spans[last].begin:
            last = rank
    waits = []
    for rank, span in enumerate(spans):
        end = min(span.end, spans[last].begin)
        if rank != last and end > span.begin:
            wait = Wait(
                rank,
                last,
                phase,
                span.begin,
                end,
            )
            waits.append(wait)
    return waits


@dataclass(frozen=True)
class WaitingTimes:
    """Sums over steps, in seconds.

    seconds: of the steps themselves, by rank. by_phase: of each phase, by rank. waited: by (rank,
    the one that it waits for).
    """

    steps: int
    seconds: list[float]
    by_phase: list[dict[str, float]]
    waited: dict[tuple[int, int], float]

    def milliseconds(self, seconds: float) -> float:
        """Milliseconds of a step from seconds of all steps."""
        return 1000 * seconds / self.steps

    def waits(self, rank: int) -> float:
        """How long a rank waits for the others."""
        total = 0.0
        for (waiting, _), seconds in self.waited.items():
            if waiting == rank:
                total += seconds
        return total

    def delays(self, rank: int) -> float:
        """How long the others wait for a rank, summed over them."""
        total = 0.0
        for (_, late), seconds in self.waited.items():
            if late == rank:
                total += seconds
        return total


def sum_times(
    ranks: Sequence[RankPhases],
    steps: Sequence[int],
) -> WaitingTimes:
    """Sums phases and waits over steps."""
    waited: dict[tuple[int, int], float] = defaultdict(float)
    by_phase: list[dict[str, float]] = []
    seconds = []
    for rank in ranks:
        totals: dict[str, float] = defaultdict(float)
        length = 0.0
        for step in steps:
            length += step_seconds(rank, step)
            for span in rank.steps[step]:
                totals[span.phase] += span.seconds
        by_phase.append(dict(totals))
        seconds.append(length)
    for step in steps:
        for wait in find_waits(ranks, step):
            pair = (wait.rank, wait.other)
            waited[pair] += wait.seconds
    return WaitingTimes(
        len(steps),
        seconds,
        by_phase,
        dict(waited),
    )
