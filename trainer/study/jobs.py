"""Runs a study's jobs, some side by side, each as the commands that a person would type.

    OUTPUT/runs/NAME/run/        the run: launch/train.py's folder, or RecBole's
    OUTPUT/runs/NAME/job.json    its settings
    OUTPUT/runs/NAME/log.txt     the commands' output

A job is done when its test ranks are there, and stays done.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.config.study import StudyConfig
from trainer.data.format.dataset import Dataset
from trainer.errors import InputError, RunStopped
from trainer.evaluation.user_ranks import read_ranks
from trainer.files.atomic import write_json
from trainer.reporting.console import format_duration, format_number
from trainer.reporting.run_log import median_over_steps, read_records
from trainer.run_files import (
    CHECKPOINTS,
    HEADLINE,
    METRICS_FILE,
    user_ranks_file,
)
from trainer.study.commands import Commands
from trainer.study.peers.recbole_bridge import RANKS as RECBOLE_RANKS
from trainer.study.peers.recbole_bridge import (
    RESULT,
    default_python,
    run_recbole,
)
from trainer.study.plan import Job
from trainer.study.results import RunResult

_JOB = "job.json"
_LOG = "log.txt"
_POLL_SECONDS = 2.0


class JobRunner:
    """Runs jobs, and reads what they have left.

    failed: {job: why}, of the jobs that this process has tried.
    """

    def __init__(
        self,
        output: Path,
        data: str | Path,
        base: list[Path],
        config: StudyConfig,
        launch: Path,
        recbole_python: str | Path | None = None,
        min_users: int = 1,
    ) -> None:
        """base: run configurations, files. launch: the folder of train.py and evaluate.py.

        min_users: as `evaluation.min_users`, by which RecBole's best epoch is chosen, too.
        """
        self.min_users = min_users
        self.output = output
        self.data = str(data)
        self.base = [str(file) for file in base]
        self.config = config
        self.recbole_python = recbole_python or default_python()
        self.failed: dict[Job, str] = {}
        self._dataset = Dataset.load(data)
        self._commands = Commands(
            launch,
            config.ranks,
            config.parallel,
        )
        self._begun: dict[Job, float] = {}  # when, of the jobs that run
        # Of the jobs that this process has run to their end.
        self._seconds = 0.0
        self._work = 0.0
        self._say: Callable[[str], None] = print

    def folder(self, job: Job) -> Path:
        """Where its run is."""
        return self._home(job) / "run"

    def is_done(self, job: Job) -> bool:
        """Raises InputError where its folder was made with other settings."""
        file = self._home(job) / _JOB
        if not file.is_file():
            return False
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != self._describe(job):
            raise InputError(
                f"{self._home(job)}: was made with other settings: remove it, or take "
                "another --output"
            )
        return self._ranks_file(job).is_file()

    def run(
        self,
        jobs: Collection[Job],
        later: float = 0.0,
    ) -> None:
        """Runs the jobs that are not done, and shows how long is left.

        later: the work of what comes after these. A job that fails is in `failed`; the others go
        on. Raises RunStopped after a signal: the same command goes on from there.
        """
        waiting = []
        for job in dict.fromkeys(jobs):
            if not self.is_done(job) and job not in self.failed:
                waiting.append(job)
        if not waiting:
            return
        total = len(waiting)
        running: dict[Future, Job] = {}
        with (
            self._commands.graceful_shutdown(),
            self._display() as show,
            ThreadPoolExecutor(self.config.parallel) as pool,
        ):
            while waiting or running:
                self._start_jobs(
                    pool,
                    waiting,
                    running,
                )
                finished, _ = wait(
                    running,
                    _POLL_SECONDS,
                    FIRST_COMPLETED,
                )
                for future in finished:
                    job = running.pop(future)
                    unfinished_work = later + sum(job.work for job in waiting)
                    self._note_finished(
                        job,
                        future.result(),
                        unfinished_work,
                        running,
                    )
                if self._commands.stopping.is_set() and not running:
                    raise RunStopped(
                        "the study was stopped, as asked; the same command goes on"
                    )
                work = later + sum(job.work for job in waiting)
                left = self._time_left(work, running.values())
                done = total - len(waiting) - len(running)
                show(self._progress_table(done, total, left))

    def _start_jobs(
        self,
        pool: ThreadPoolExecutor,
        waiting: list[Job],
        running: dict[Future, Job],
    ) -> None:
        """As many as may run side by side; none any more after a signal."""
        while waiting and len(running) < self.config.parallel:
            if self._commands.stopping.is_set():
                return
            job = waiting.pop(0)
            self._begun[job] = time.monotonic()
            running[pool.submit(self._run_job, job)] = job

    def _note_finished(
        self,
        job: Job,
        failure: str | None,
        work: float,
        running: dict[Future, Job],
    ) -> None:
        """work: that waits and comes later."""
        seconds = time.monotonic() - self._begun.pop(job)
        if failure is not None:
            self.failed[job] = failure
            self._say(f"{job.name}: {failure}")
        elif not self._commands.stopping.is_set():
            self._seconds += seconds
            self._work += job.work
            left = self._time_left(work, running.values())
            validation = self.read(job).validation
            self._say(
                f"{job.name}: validation {HEADLINE} {validation:.4f} in "
                f"{format_duration(seconds)}; about {left} left"
            )

    def read(self, job: Job) -> RunResult:
        """What a done run has left."""
        ranks = read_ranks(self._ranks_file(job))
        if job.recbole:
            result = json.loads(
                (self.folder(job) / RESULT).read_text(encoding="utf-8")
            )
            return RunResult(
                **ranks,
                validation=result["validation"],
                seconds=result["seconds"],
                users_per_second=result["users_per_second"],
                epochs=len(result["epochs"]),
                best_is_last=result.get("best_epoch", 0) + 1
                >= len(result["epochs"]),
            )
        records = read_records(self.folder(job) / METRICS_FILE)
        validations = _select(records, "validation")
        return RunResult(
            **ranks,
            validation=_best_validation(validations),
            seconds=max(record["seconds"] for record in records),
            users_per_second=_median_speed(_select(records, "train")),
            epochs=len(validations),
            best_is_last=_best_is_last(validations),
        )

    def _home(self, job: Job) -> Path:
        """The job's folder."""
        return self.output / "runs" / job.name

    def _describe(self, job: Job) -> dict[str, Any]:
        """Its settings, as job.json has them."""
        if job.recbole:
            settings: dict[str, Any] = {
                "recbole": self.config.recbole[job.system],
                "epochs": self.config.recbole_epochs,
            }
        else:
            settings = {
                "settings": list(job.settings),
                "base": [
                    Path(file).read_text(encoding="utf-8") for file in self.base
                ],
            }
        settings["dataset"] = self._dataset.fingerprint
        return settings

    def _ranks_file(self, job: Job) -> Path:
        """The test ranks by user: the last file that a job leaves."""
        if job.recbole:
            return self.folder(job) / RECBOLE_RANKS
        return self.folder(job) / user_ranks_file("test")

    def _run_job(self, job: Job) -> str | None:
        """Runs a job to its end. Returns why it failed, or None."""
        home = self._home(job)
        home.mkdir(parents=True, exist_ok=True)
        try:
            if not (home / _JOB).is_file():
                write_json(home / _JOB, self._describe(job))
            if job.recbole:
                self._run_recbole(job)
            else:
                self._train_and_evaluate(job)
        except InputError as error:
            if self._commands.stopping.is_set():
                return None
            return " ".join(str(error).split())
        return None

    def _train_and_evaluate(self, job: Job) -> None:
        """Runs a system: launch/train.py, then launch/evaluate.py among all items."""
        log = self._home(job) / _LOG
        run = self.folder(job)
        base = [f"--config={file}" for file in self.base]
        settings = [
            *job.settings,
            f"data={self.data}",
            f"run={run}",
            "log.tensorboard=false",
        ]
        self._commands.run(
            log,
            "train.py",
            *base,
            *settings,
        )
        self._commands.run(
            log,
            "evaluate.py",
            "--run",
            run,
            "--data",
            self.data,
            "--ranking",
            "full",
        )
        if not self.config.keep_models:
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)

    def _run_recbole(self, job: Job) -> None:
        """Runs a baseline of RecBole's."""
        config = self.config
        with (self._home(job) / _LOG).open("a", encoding="utf-8") as log:
            run_recbole(
                Dataset.load(self.data),
                self.folder(job),
                job.system,
                job.seed,
                self.recbole_python,
                config.recbole[job.system],
                config.recbole_epochs,
                config.recbole_patience,
                config.recbole_minutes,
                say=lambda line: print(line, file=log, flush=True),
                min_users=self.min_users,
                given=self.output / "given",
            )

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[Table], None]]:
        """Yields what shows a table: on a terminal, else nothing. Lines go through `_say`."""
        console = Console()
        if not console.is_terminal:
            self._say = lambda line: print(line, flush=True)
            yield lambda table: None
            return
        with Live(console=console, refresh_per_second=2) as live:
            self._say = lambda line: live.console.print(Text(line))
            yield live.update
        self._say = print

    def _progress_table(
        self,
        done: int,
        total: int,
        left: str,
    ) -> Table:
        """The jobs that run, with their best validation so far."""
        table = Table(
            title=f"{done} of {total} runs done, about {left} left",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        table.add_column("run", justify="left")
        for column in ("epoch", f"validation {HEADLINE}", "time"):
            table.add_column(column, justify="right")
        for job, begun in self._begun.items():
            records = read_records(self.folder(job) / METRICS_FILE)
            validations = _select(records, "validation")
            best = _best_validation(validations) if validations else None
            table.add_row(
                Text(job.name),
                str(len(validations)),
                format_number(best),
                format_duration(time.monotonic() - begun),
            )
        return table

    def _time_left(
        self,
        work: float,
        running: Collection[Job],
    ) -> str:
        """Time for what waits, comes later and runs, from what runs have taken so far; words."""
        if self._work == 0:
            return "an unknown time"
        now = time.monotonic()
        seconds_per_work = self._seconds / self._work
        active = 0.0
        for job in running:
            expected = seconds_per_work * job.work
            spent = now - self._begun[job]
            active += max(0.1 * expected, expected - spent)
        total = active + seconds_per_work * work
        return format_duration(total / self.config.parallel)


def _select(
    records: list[dict[str, Any]],
    kind: str,
) -> list[dict[str, Any]]:
    """The records of a kind."""
    return [record for record in records if record["kind"] == kind]


def _best_validation(validations: list[dict[str, Any]]) -> float:
    """The best mean of HEADLINE; of at least one record."""
    return max(record["mean"][HEADLINE] or 0.0 for record in validations)


def _best_is_last(validations: list[dict[str, Any]]) -> bool:
    """Whether the best validation was the last; the first of equal ones is the best."""
    values = [record["mean"][HEADLINE] or 0.0 for record in validations]
    return values.index(max(values)) == len(values) - 1


def _median_speed(train: list[dict[str, Any]]) -> float:
    """Users per second; NaN where no record has them."""
    speed = median_over_steps(train, "users_per_second")
    return float("nan") if speed is None else speed
