"""The GPU hour: what only a GPU can show, in order of value, within a budget of seconds.

    python benchmarks/gpu_hour.py --output DIR                     with a dataset of its own
    python benchmarks/gpu_hour.py --output DIR --data DATA --budget 3000
    python benchmarks/gpu_hour.py --output DIR --only steps,profile
    python benchmarks/gpu_hour.py --list                           stages, limits, commands
    python benchmarks/gpu_hour.py --output DIR --tiny              every stage, small, on a CPU

Stages: the environment, tests on the device, a training run that is resumed and evaluated, steps
of several sizes in bf16 and fp32, a profile, parts of a step, a cached table, ranking, loaders
(`gpu_stages.py`). They take the first GPU. Each is a process of its own, which is ended after its
share of the budget, or when the budget is over; what it leaves of its share goes to those after
it. A stage that fails, hangs or is killed ends no other.

DIR gets, as it comes:

    results.jsonl        a line when a stage begins, and one when it has ended
    summary.md           a table of all stages
    STAGE.log            what a stage prints
    STAGE.json           a benchmark's record, as benchmarks/results has it
    STAGE/               files of a run: metrics, report, operators

The exit status says nothing of the stages: 0; 2 where something given cannot be used; 128 and the
signal's number where it was stopped.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_stages import ON_CPU, Places, Stage, last_line, list_stages
from trainer.child_processes import end_with, kill_tree
from trainer.config.command_line import option, parse_options
from trainer.errors import InputError, exit_on_input_error
from trainer.files.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
RUNNING = "running"
WELL = "ok"
FAILED = "failed"
OVER = "over its limit"
STOPPED = "stopped"
NOT_BEGUN = "not begun"
_RESULTS = "results.jsonl"
_SUMMARY = "summary.md"
_TAIL = 3000  # characters of a log that a result has
_GRACE = 8.0  # seconds in which a stage that was asked to end may do so
_RESERVE = 2.0  # seconds of the budget that the last words take
_LOOK_AGAIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    output: str = option("the folder that gets all results", "", metavar="DIR")
    budget: float = option("seconds that all stages take together", 560.0)
    data: str = option(
        "a prepared dataset; without it one is synthesized, which needs DuckDB",
        "",
        metavar="DIR",
    )
    work: str = option(
        "a folder for runs and dataset, which stays; without it a temporary one",
        "",
        metavar="DIR",
    )
    only: str = option("these stages alone, by commas", "", metavar="NAMES")
    skip: str = option("without these stages", "", metavar="NAMES")
    list: bool = option("print the stages, and run none", False)
    tiny: bool = option("every stage in small form, on a CPU", False)


@dataclass
class Result:
    """What is known of a stage. status: of its process, negative for a signal."""

    stage: str
    state: str
    seconds: float = 0.0
    status: int | None = None
    headline: str = ""


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main(arguments: Iterable[str] | None = None) -> int:
    """Runs the stages; the exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-hour-") as scratch:
        output = Path(options.output).resolve()
        places = Places(
            output,
            Path(options.work or scratch).resolve(),
            Path(options.data).resolve() if options.data else None,
        )
        stages = choose(list_stages(places, options.tiny), options)
        if options.list:
            print(describe(stages, options.budget))
            return 0
        check(options)
        driver = Driver(stages, places, options)
        driver.run()
    return driver.exit_status


def choose(stages: Sequence[Stage], options: Options) -> list[Stage]:
    """The stages that --only and --skip leave, in their order of value."""
    names = [stage.name for stage in stages]
    only = _names(options.only, "--only", names) or names
    skipped = _names(options.skip, "--skip", names)
    return [
        stage
        for stage in stages
        if stage.name in only and stage.name not in skipped
    ]


def _names(text: str, flag: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"{flag} has {name}: there are {', '.join(known)}")
    return names


def check(options: Options) -> None:
    """Raises InputError for what no stage could use."""
    if not options.output:
        raise InputError("--output is missing: give the folder for the results")
    if options.budget <= 0:
        raise InputError(f"--budget is {options.budget:g}: give more than 0")
    if options.data and not Path(options.data).is_dir():
        raise InputError(f"--data {options.data}: there is no such folder")


def describe(stages: Sequence[Stage], budget: float) -> str:
    """Name, limit, question and command of each stage."""
    lines = []
    for stage in stages:
        limit = stage.share * budget
        lines.append(f"{stage.name:20}{limit:5.0f} s  {stage.question}")
        lines.append(f"    {shlex.join(stage.command)}")
    return "\n".join(lines)


class Driver:
    """Runs stages one after the other, and writes what is known of them whenever that changes."""

    def __init__(
        self, stages: Sequence[Stage], places: Places, options: Options
    ):
        self._stages = stages
        self._places = places
        self._options = options
        self._end = time.monotonic() + options.budget
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        self.results: dict[str, Result] = {}

    @property
    def exit_status(self) -> int:
        """0, or by the signal that has stopped it."""
        return 0 if self._signal is None else 128 + self._signal

    def run(self) -> None:
        """Runs all of them. Signals end the stage that runs, and begin no other."""
        self._places.output.mkdir(parents=True, exist_ok=True)
        self._places.work.mkdir(parents=True, exist_ok=True)
        names = [stage.name for stage in self._stages]
        self._write(begun=_now(), options=asdict(self._options), stages=names)
        before = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, self._stop)
        try:
            for stage in self._stages:
                self._run_if_possible(stage)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print(f"\n{self._summarize()}", flush=True)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self._signal = number

    @property
    def _left(self) -> float:
        """Seconds of the budget."""
        return self._end - _RESERVE - time.monotonic()

    def _run_if_possible(self, stage: Stage) -> None:
        reason = self._reason_against(stage)
        if reason:
            self._note(Result(stage.name, NOT_BEGUN, headline=reason))
        else:
            self._run(stage)
        write_text(self._places.output / _SUMMARY, self._summarize() + "\n")

    def _reason_against(self, stage: Stage) -> str:
        """Why a stage is not begun; "" where it is."""
        if self._signal is not None:
            return "the driver was stopped"
        for name in stage.needs:
            if name in self.results and self.results[name].state != WELL:
                return f"{name} is {self.results[name].state}"
        if self._left < stage.least:
            return (
                f"{max(0.0, self._left):.0f} s are left, and it takes {stage.least:.0f}: give a "
                "larger --budget, or --only"
            )
        return ""

    def _run(self, stage: Stage) -> None:
        """Runs a stage to its end, or to its limit."""
        limit = min(stage.share * self._options.budget, self._left)
        result = Result(stage.name, RUNNING)
        command = shlex.join(stage.command)
        self._note(result, limit=round(limit, 1), command=command)
        log = self._places.output / f"{stage.name}.log"
        begin = time.monotonic()
        with open(log, "wb") as sink:
            sink.write(f"$ {command}\n".encode())
            sink.flush()
            try:
                result.state = self._wait(stage, sink, begin + limit)
            except OSError as error:
                result.state = FAILED
                sink.write(f"{error}\n".encode())
        result.seconds = round(time.monotonic() - begin, 1)
        result.status = self._process and self._process.returncode
        self._process = None
        text = log.read_text(encoding="utf-8", errors="replace")
        _, _, text = text.partition("\n")
        result.headline = headline_of(stage, result.state, text)
        self._keep(stage)
        self._note(result, tail=text[-_TAIL:])

    def _wait(self, stage: Stage, sink: Any, deadline: float) -> str:
        """Starts the stage's process and waits for it; its state."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment |= dict(stage.environment)
        if self._options.tiny:
            environment |= ON_CPU
        self._process = process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=end_with(os.getpid()),
        )
        state = ""
        while process.poll() is None:
            if self._signal is not None:
                state = STOPPED
            elif time.monotonic() > deadline:
                state = OVER
            if state:
                end(process)
                return state
            time.sleep(_LOOK_AGAIN)
        end(process)  # what it has left behind
        return WELL if process.returncode == 0 else FAILED

    def _keep(self, stage: Stage) -> None:
        """Copies files of the stage's run to the output."""
        folder = self._places.output / stage.name
        for file in stage.keep:
            if file.is_file():
                folder.mkdir(exist_ok=True)
                shutil.copy(file, folder)

    def _note(self, result: Result, **more: Any) -> None:
        """Keeps a result, writes it and prints it."""
        self.results[result.stage] = result
        self._write(at=_now(), **asdict(result), **more)
        line = f"{result.stage}: {result.state}"
        if result.state not in (RUNNING, NOT_BEGUN):
            line += f", {result.seconds:.0f} s"
        if result.headline:
            line += f": {result.headline}"
        print(line, flush=True)

    def _write(self, **line: Any) -> None:
        """Appends a line to the results; it is on disk when this returns."""
        text = json.dumps(line, ensure_ascii=False)
        with open(
            self._places.output / _RESULTS, "a", encoding="utf-8"
        ) as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())

    def _summarize(self) -> str:
        """A table of all stages, and how to run again what has not gone well."""
        lines = ["| stage | state | s | |", "|---|---|--:|---|"]
        missing = []
        for stage in self._stages:
            result = self.results.get(stage.name)
            if result is None:
                missing.append(stage.name)
                continue
            if result.state not in (WELL, RUNNING):
                missing.append(stage.name)
            headline = result.headline.replace("|", "¦")
            lines.append(
                f"| {result.stage} | {result.state} | {result.seconds:.0f} | {headline} |"
            )
        if missing:
            lines.append(f"\nNot done: --only {','.join(missing)}")
        return "\n".join(lines)


def headline_of(stage: Stage, state: str, log: str) -> str:
    """What came of a stage in a line; what its log says last where nothing can be read."""
    last = last_line(log)
    if state == WELL:
        try:
            return stage.headline(log)
        except (OSError, LookupError, ValueError, TypeError) as error:
            return f"no figures ({type(error).__name__}: {error}); {last}"
    return last


def end(process: "subprocess.Popen[bytes]") -> None:
    """Has a process and all that it has started end: asked first, then killed."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    sys.exit(main())
