"""Files of phases: what each rank did in each step, a JSON line a step.

    run/phases/rank-00000.jsonl

    {"rank": 0, "world_size": 2, "host": "a", "device": "cpu", "time": 1764412345.5}
    {"step": 1, "time": 1764412346.25, "spans": [["between", 0.0, 3.1], ["data", 3.1, 0.9], …]}

`time` is Unix time in seconds, by the rank's own clock. A span is a phase, when it began after the
line's time, and how long it lasted, both in milliseconds. The time between two steps is in the line of
the second one. A rank begins its file anew with the first step that it makes, also where the run is
resumed.
"""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from trainer.errors import InputError
from trainer.reporting.trace.phases import PHASES
from trainer.run_files import PHASES_FOLDER, phases_file

_FLUSH_SECONDS = 10.0


@dataclass(frozen=True)
class Span:
    """A phase of a step. begin, end: Unix time, in seconds."""

    phase: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class RankPhases:
    """What one rank did. steps: its spans, in order, by the number of the step."""

    rank: int
    world_size: int
    host: str
    device: str
    steps: dict[int, list[Span]]


class PhaseWriter:
    """Writes one rank's file of phases; listens to its `PhaseClock`."""

    def __init__(self, run: Path, rank: int, world_size: int, device: str):
        self._file = run / phases_file(rank)
        self._head = {
            "rank": rank,
            "world_size": world_size,
            "host": socket.gethostname(),
            "device": device,
        }
        self._stream: TextIO | None = None
        self._marks: list[tuple[str, float]] = []
        self._flushed = time.monotonic()
        self._epoch = time.time() - time.perf_counter()

    def listen(self, phase: str, now: float) -> None:
        """Takes note of a phase that begins."""
        self._marks.append((phase, now))

    def end_step(self, step: int) -> None:
        """Writes the line of a step, whose last phase began just now: it is the next step's first."""
        if self._stream is None:
            self._stream = self._open()
        if not self._marks:
            return
        _, begun = self._marks[0]
        spans = []
        for mark, following in pairwise(self._marks):
            phase, begin = mark
            _, end = following
            offset = 1000 * (begin - begun)
            length = 1000 * (end - begin)
            spans.append([phase, round(offset, 3), round(length, 3)])
        line = {
            "step": step,
            "time": self._epoch + begun,
            "spans": spans,
        }
        text = json.dumps(line)
        self._stream.write(f"{text}\n")
        del self._marks[:-1]
        now = time.monotonic()
        if now - self._flushed > _FLUSH_SECONDS:
            self._stream.flush()
            self._flushed = now

    def _open(self) -> TextIO:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        stream = self._file.open("w", encoding="utf-8")
        head = self._head | {"time": time.time()}
        text = json.dumps(head)
        stream.write(f"{text}\n")
        return stream

    def close(self) -> None:
        """Writes what is left."""
        if self._stream is not None:
            self._stream.close()


def read_phases(run: Path) -> list[RankPhases]:
    """The phases of all ranks of a run's last attempt, in the order of the ranks.

    Files of ranks that an earlier attempt had are passed over. Raises InputError where there are
    none, or a rank's is missing.
    """
    first = run / phases_file(0)
    if not first.is_file():
        raise InputError(
            f"{run / PHASES_FOLDER}: has no {first.name}: train with profile.phases=true"
        )
    ranks = [_read_file(first, 0)]
    for rank in range(1, ranks[0].world_size):
        file = run / phases_file(rank)
        if not file.is_file():
            raise InputError(
                f"{file}: not found, and the run had {ranks[0].world_size} ranks: "
                "copy the phases of all hosts to one folder"
            )
        ranks.append(_read_file(file, rank))
    return ranks


def _read_file(file: Path, rank: int) -> RankPhases:
    """One rank's phases. Lines that are none (the last one of a rank that was killed) are left out."""
    lines = _iterate_lines(file)
    head = next(lines, {})
    try:
        if head["rank"] != rank:
            raise ValueError
        world_size = int(head["world_size"])
        host = str(head["host"])
        device = str(head["device"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{file}: its first line is not that of rank {rank}'s phases: "
            "train with profile.phases=true anew"
        ) from None
    steps = {}
    for line in lines:
        try:
            steps[int(line["step"])] = _read_spans(line)
        except (KeyError, TypeError, ValueError):
            continue
    return RankPhases(rank, world_size, host, device, steps)


def _iterate_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; anything else is left out."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _read_spans(line: dict[str, Any]) -> list[Span]:
    """The spans of a step's line. Raises ValueError for a phase that there is not."""
    begun = float(line["time"])
    spans = []
    for phase, offset, length in line["spans"]:
        if phase not in PHASES:
            raise ValueError(phase)
        begin = begun + float(offset) / 1000
        end = begin + float(length) / 1000
        spans.append(Span(phase, begin, end))
    return spans
