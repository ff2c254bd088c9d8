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
from dataclasses import dataclass

from trainer.reporting.trace.phases import EXCHANGES, SUMS
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
    first: RankPhases, other: RankPhases, steps: list[int]
) -> list[float]:
    """By how much a rank's clock is before the first one's, at the end of each step's last sum."""
    differences = []
    for step in steps:
        first_sums = _spans_of(first, step, SUMS)
        other_sums = _spans_of(other, step, SUMS)
        if first_sums and other_sums:
            differences.append(other_sums[-1].end - first_sums[-1].end)
    return differences


def _shifted(rank: RankPhases, shift: float) -> RankPhases:
    if not shift:
        return rank
    steps = {}
    for step, spans in rank.steps.items():
        moved = []
        for span in spans:
            begin = span.begin - shift
            moved.append(Span(span.phase, begin, span.end - shift))
        steps[step] = moved
    return RankPhases(rank.rank, rank.world_size, rank.host, rank.device, steps)


def _spans_of(rank: RankPhases, step: int, phase: str) -> list[Span]:
    return [span for span in rank.steps[step] if span.phase == phase]


def find_waits(ranks: Sequence[RankPhases], step: int) -> list[Wait]:
    """All waits of a step, of phases that are an exchange.

    A phase that the ranks do not have equally often is passed over: nobody knows which belongs to
    which.
    """
    waits = []
    for phase in EXCHANGES:
        by_rank = [_spans_of(rank, step, phase) for rank in ranks]
        counts = {len(spans) for spans in by_rank}
        if len(counts) != 1:
            continue
        for spans in zip(*by_rank, strict=True):
            waits += _waits_of_exchange(phase, spans)
    return waits


def _waits_of_exchange(phase: str, spans: Sequence[Span]) -> list[Wait]:
    """The waits of one exchange. spans: of each rank."""
    begins = [span.begin for span in spans]
    last = begins.index(max(begins))
    waits = []
    for rank, span in enumerate(spans):
        end = min(span.end, begins[last])
        if rank != last and end > span.begin:
            waits.append(Wait(rank, last, phase, span.begin, end))
    return waits


@dataclass(frozen=True)
class WaitingTimes:
    """Sums over steps. seconds: of all steps, by rank. waited: by (rank, the one it waits for)."""

    steps: int
    seconds: list[float]
    by_phase: list[dict[str, float]]
    waited: dict[tuple[int, int], float]

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
    ranks: Sequence[RankPhases], steps: Sequence[int]
) -> WaitingTimes:
    """Sums phases and waits over steps."""
    waited: dict[tuple[int, int], float] = defaultdict(float)
    by_phase: list[dict[str, float]] = []
    seconds = []
    for rank in ranks:
        totals: dict[str, float] = defaultdict(float)
        for step in steps:
            for span in rank.steps[step]:
                totals[span.phase] += span.seconds
        by_phase.append(dict(totals))
        seconds.append(sum(totals.values()))
    for step in steps:
        for wait in find_waits(ranks, step):
            waited[wait.rank, wait.other] += wait.seconds
    return WaitingTimes(len(steps), seconds, by_phase, dict(waited))
