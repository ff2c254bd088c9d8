"""The profiler: a trace of some steps a rank, and a table of the operators that took longest.

`profile.steps=100-110` leaves in the run's folder:

    run/profile/steps-100-110-rank-00000.trace.json.gz    for https://ui.perfetto.dev
    run/profile/operators.txt                             the first rank's operators

A trace is PyTorch's own, with the phases of a step (trainer.reporting.trace.phases) as ranges.
"""

import sys
import threading
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from trainer.checkpoint.layout import RunState
from trainer.errors import InputError
from trainer.files.atomic import write_text
from trainer.run_files import OPERATORS, PROFILE, trace_file
from trainer.training.callbacks import Callback, StepReport
from trainer.training.run_context import RunContext

_OPERATORS = 50  # in the file
_SHOWN = 12  # of them in the log
_LONGEST_NAME = 44
_RANGE = "phase: "  # before the names of ranges


class PhaseRanges:
    """Ranges of the profiler, one for each phase; listens to a `PhaseClock`."""

    def __init__(self) -> None:
        self._range: record_function | None = None
        self._thread = threading.get_ident()

    def listen(self, phase: str, _now: float) -> None:
        """Ends the range that there is, and begins another one."""
        # A range belongs to one thread; on a device backward has another.
        if threading.get_ident() != self._thread:
            return
        self.end()
        self._range = record_function(f"{_RANGE}{phase}")
        self._range.__enter__()

    def end(self) -> None:
        """Ends the range that there is."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None


class StepProfiler(Callback):
    """Profiles the steps of `profile.steps` on this rank. What goes wrong with it ends no run."""

    def __init__(self, context: RunContext, first: int, last: int):
        """first, last: steps, counted from 1, both included."""
        self._context = context
        self._first = first
        self._last = last
        self._profiler: profile | None = None
        self._ranges = PhaseRanges()
        self._begun_after = 0
        self.begin_if_due()

    def begin_if_due(self) -> None:
        """Begins where the next step is one of them."""
        step = self._context.state.step
        if self._profiler is None and self._first - 1 <= step < self._last:
            with self._context.meter.paused():
                self._begin()

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Begins or ends with a step."""
        self.begin_if_due()
        if self._profiler is not None and state.step >= self._last:
            with self._context.meter.paused(), self._context.watchdog.held():
                self.close()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._context.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._begun_after = self._context.state.step
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._context.trainer.phases.listeners.append(self._ranges.listen)

    def close(self) -> None:
        """Ends the profile, if there is one, and writes what it has; fewer steps than asked for too."""
        profiler = self._profiler
        if profiler is None:
            return
        self._profiler = None
        self._context.trainer.phases.listeners.remove(self._ranges.listen)
        self._ranges.end()
        profiler.stop()
        try:
            self._write(profiler)
        except (OSError, RuntimeError) as error:
            rank = self._context.ranks.rank
            print(
                f"rank {rank}: the profile is not written: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _write(self, profiler: profile) -> None:
        context = self._context
        folder = context.folder / PROFILE
        folder.mkdir(parents=True, exist_ok=True)
        first = self._begun_after + 1
        last = context.state.step
        trace = context.folder / trace_file(first, last, context.ranks.rank)
        profiler.export_chrome_trace(str(trace))
        if not context.ranks.first:
            return
        steps = last - first + 1
        title = f"operators of steps {first} to {last}, rank 0"
        on_device = context.ranks.device.type == "cuda"
        lines = format_operators(profiler.key_averages(), steps, on_device)
        text = "\n".join([title, *lines])
        write_text(folder / OPERATORS, f"{text}\n")
        shown = "\n".join([title, *lines[: _SHOWN + 1]])
        context.log.message(
            f"{shown}\n{folder}: all of them, and a trace a rank "
            "(open it at https://ui.perfetto.dev)"
        )


def format_operators(
    averages: Any,
    steps: int,
    on_device: bool = False,
) -> list[str]:
    """A head and a line for each operator, those first that took longest by themselves.

    averages: of torch.profiler, one of all calls of an operator. on_device: by the device's time.

        operator (host)                                 calls    ms a step    share
        aten::addmm                                       440       28.400    25.3%
    """
    rows = []
    total = 0.0
    for average in averages:
        if average.key.startswith(_RANGE):
            continue
        microseconds = average.self_cpu_time_total
        if on_device:
            microseconds = average.self_device_time_total
        total += microseconds
        rows.append((microseconds, average.count, average.key))
    rows.sort(reverse=True)
    head = "operator (device)" if on_device else "operator (host)"
    lines = [_operator_line(head, "calls", "ms a step", "share")]
    for microseconds, calls, name in rows[:_OPERATORS]:
        if len(name) > _LONGEST_NAME:
            name = name[: _LONGEST_NAME - 1] + "…"
        milliseconds = microseconds / 1000 / steps
        share = microseconds / max(total, 1.0)
        line = _operator_line(
            name,
            f"{calls:,}",
            f"{milliseconds:,.3f}",
            f"{share:.1%}",
        )
        lines.append(line)
    return lines


def _operator_line(name: str, calls: str, time: str, share: str) -> str:
    """A line of the table, in columns."""
    return f"{name:{_LONGEST_NAME}}{calls:>8}{time:>13}{share:>9}"


def require_profile_window(window: tuple[int, int], total_steps: int) -> None:
    """Raises InputError where the steps to profile are after the run's last one."""
    first, last = window
    if last > total_steps:
        raise InputError(
            f"profile.steps is {first}-{last}, and the run has {total_steps} steps: "
            f"give steps up to {total_steps}"
        )
