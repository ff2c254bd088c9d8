"""Runs a study's jobs, some side by side, each as the commands that a person would type; what is done stays done.

    OUTPUT/runs/NAME/run/        the run: launch/train.py's folder, or RecBole's
    OUTPUT/runs/NAME/job.json    what was asked for
    OUTPUT/runs/NAME/log.txt     what the commands said

A job is done when its test ranks are there.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.data.format.dataset import Dataset
from trainer.errors import InputError, Stopped
from trainer.evaluation.evaluate_run import RANKS
from trainer.evaluation.user_ranks import read_ranks
from trainer.files.atomic import write_json
from trainer.reporting.run_log import (
    HEADLINE,
    METRICS_FILE,
    duration,
    number,
    read_records,
)
from trainer.study.peers.recbole_bridge import RANKS as RECBOLE_RANKS
from trainer.study.peers.recbole_bridge import RESULT, default_python, run_recbole
from trainer.study.plan import Job, StudyConfig

_JOB, _LOG = "job.json", "log.txt"
_POLL = 2.0


class Jobs:
    """Everything that runs. launch: the folder of train.py and evaluate.py; base: run configurations, files."""

    def __init__(
        self,
        output: Path,
        data,
        base,
        config: StudyConfig,
        launch: Path,
        recbole_python=None,
    ):
        self.output, self.data, self.base, self.config, self.launch = (
            output,
            str(data),
            list(map(str, base)),
            config,
            launch,
        )
        self.recbole_python = recbole_python or default_python()
        self._fingerprint = Dataset.load(data).fingerprint
        self.failed, self._active, self._stopping = {}, {}, threading.Event()
        self._children, self._lock = {}, threading.Lock()
        self._seconds, self._work = (
            0.0,
            0.0,
        )  # of jobs that were run to their end by this process
        self._say = print

    def folder(self, job: Job) -> Path:
        """Where its run is."""
        return self._home(job) / "run"

    def done(self, job: Job) -> bool:
        """Raises InputError where its folder has been made with other settings."""
        file = self._home(job) / _JOB
        if not file.is_file():
            return False
        try:
            before = json.loads(file.read_text())
        except ValueError:
            before = None
        if before != self._asked(job):
            raise InputError(
                f"{self._home(job)}: was made with other settings: remove it, or take another --output"
            )
        return self._ranks(job).is_file()

    def run(self, jobs: list[Job], later: float = 0.0):
        """Runs those that are not done, and shows how long is left. later: the work of what is to come after these.

        What fails is in `failed`, {job: why}; the others go on. Raises Stopped where the process was asked to stop: the same
        command goes on from there.
        """
        todo = [
            job
            for job in dict.fromkeys(jobs)
            if not self.done(job) and job not in self.failed
        ]
        if not todo:
            return
        waiting = list(todo)
        with (
            self._signals(),
            self._display() as show,
            ThreadPoolExecutor(self.config.parallel) as pool,
        ):
            running = {}
            while waiting or running:
                while (
                    waiting
                    and len(running) < self.config.parallel
                    and not self._stopping.is_set()
                ):
                    job = waiting.pop(0)
                    self._active[job] = time.monotonic()
                    running[pool.submit(self._one, job)] = job
                finished, _ = wait(running, _POLL, FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    seconds = time.monotonic() - self._active.pop(job)
                    if (why := future.result()) is not None:
                        self.failed[job] = why
                        self._say(f"{job.name}: {why}")
                        continue
                    if not self._stopping.is_set():
                        self._seconds, self._work = (
                            self._seconds + seconds,
                            self._work + job.work,
                        )
                        left = self._left(waiting, running.values(), later)
                        self._say(
                            f"{job.name}: {self._figure(job)} in {duration(seconds)}; about {left} left"
                        )
                if self._stopping.is_set() and not running:
                    raise Stopped(
                        "the study was stopped, as asked; the same command goes on"
                    )
                left = self._left(waiting, running.values(), later)
                show(
                    self._table(
                        len(todo) - len(waiting) - len(running), len(todo), left
                    )
                )

    def read(self, job: Job) -> dict:
        """What a done run has found: user, domain, sampled, full (arrays), validation, seconds, users_per_second, epochs."""
        folder, found = self.folder(job), read_ranks(self._ranks(job))
        if job.recbole:
            result = json.loads((folder / RESULT).read_text())
            more = {
                "validation": result["validation"],
                "seconds": result["seconds"],
                "epochs": len(result["epochs"]),
            }
            return found | more | {"users_per_second": result["users_per_second"]}
        records = read_records(folder / METRICS_FILE)
        validations = [record for record in records if record["kind"] == "validation"]
        speeds = [
            r["users_per_second"]
            for r in records
            if r["kind"] == "train" and r.get("users_per_second")
        ]
        return found | {
            "validation": max(
                record["mean"][HEADLINE] or 0.0 for record in validations
            ),
            "seconds": max(record["seconds"] for record in records),
            "users_per_second": sorted(speeds)[len(speeds) // 2]
            if speeds
            else float("nan"),
            "epochs": len(validations),
        }

    def _home(self, job):
        return self.output / "runs" / job.name

    def _asked(self, job):
        asked = {
            "settings": list(job.settings),
            "base": [Path(file).read_text() for file in self.base],
        }
        if job.recbole:
            asked = {
                "recbole": self.config.recbole[job.system],
                "epochs": self.config.recbole_epochs,
            }
        return asked | {"dataset": self._fingerprint}

    def _ranks(self, job):
        return self.folder(job) / (
            RECBOLE_RANKS if job.recbole else RANKS.format(split="test")
        )

    def _one(self, job):
        """Runs a job. Returns why it failed, or None."""
        home, run = self._home(job), self.folder(job)
        home.mkdir(parents=True, exist_ok=True)
        try:
            if not (home / _JOB).is_file():
                write_json(home / _JOB, self._asked(job))
            if job.recbole:
                self._recbole(job, home)
                return None
            base = [f"--config={file}" for file in self.base]
            given = [
                *job.settings,
                f"data={self.data}",
                f"run={run}",
                "log.tensorboard=false",
            ]
            self._command(job, home, "train.py", *base, *given)
            self._command(
                job,
                home,
                "evaluate.py",
                "--run",
                run,
                "--data",
                self.data,
                "--ranking",
                "full",
            )
            if not self.config.keep_models:
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
        except InputError as error:
            return None if self._stopping.is_set() else " ".join(str(error).split())
        return None

    def _recbole(self, job, home):
        config, data = self.config, Dataset.load(self.data)
        with (home / _LOG).open("a") as log:
            run_recbole(
                data,
                self.folder(job),
                job.system,
                job.seed,
                self.recbole_python,
                config.recbole[job.system],
                config.recbole_epochs,
                config.recbole_patience,
                config.recbole_minutes,
                say=lambda line: print(line, file=log, flush=True),
                given=self.output / "given",
            )

    def _command(self, job, home, script, *arguments):
        """Raises InputError where it does not end with 0."""
        ranks, cores = self.config.ranks, len(os.sched_getaffinity(0))
        launcher = [sys.executable]
        if ranks > 1:
            launcher = [
                Path(sys.executable).with_name("torchrun"),
                "--standalone",
                f"--nproc-per-node={ranks}",
            ]
        threads = max(1, cores // (ranks * self.config.parallel))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        path = os.pathsep.join(
            filter(None, [str(self.launch.parent), os.environ.get("PYTHONPATH")])
        )
        with (home / _LOG).open("a") as log:
            command = [
                str(word) for word in (*launcher, self.launch / script, *arguments)
            ]
            # In a session of its own: Ctrl-C is ours to pass on, once.
            pipes = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": log,
                "start_new_session": True,
            }
            child = subprocess.Popen(
                command, env=environment | {"PYTHONPATH": path}, **pipes
            )
            with self._lock:
                self._children[job] = child
            if self._stopping.is_set():
                child.terminate()
            try:
                status = child.wait()
            finally:
                with self._lock:
                    del self._children[job]
        if status:
            lines = (home / _LOG).read_text(errors="replace").strip().splitlines()
            errors = (
                [line for line in lines if line.startswith("error: ")]
                or lines
                or ["it said nothing"]
            )
            raise InputError(
                f"{script} ended with status {status}: {errors[-1]} (more in {home / _LOG})"
            )

    @contextlib.contextmanager
    def _signals(self):
        """SIGINT, SIGTERM and SIGUSR1 ask the runs to write a checkpoint and end."""

        def stop(number, frame):
            self._stopping.set()
            with self._lock:
                for child in self._children.values():
                    child.terminate()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _display(self):
        """What shows a table: on a terminal, else nothing; lines go through `_say`."""
        console = Console()
        if not console.is_terminal:
            self._say = lambda line: print(line, flush=True)
            yield lambda table: None
            return
        with Live(console=console, refresh_per_second=2) as live:
            self._say = lambda line: live.console.print(Text(line))
            yield live.update
        self._say = print

    def _table(self, done, total, left):
        table = Table(
            title=f"{done} of {total} runs done, about {left} left",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for column in ("run", "epoch", f"validation {HEADLINE}", "time"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for job, begun in self._active.items():
            validations = self._validations(job)
            best = max(
                (record["mean"][HEADLINE] or 0.0 for record in validations),
                default=None,
            )
            table.add_row(
                Text(job.name),
                str(len(validations)),
                number(best),
                duration(time.monotonic() - begun),
            )
        return table

    def _validations(self, job):
        return [
            record
            for record in read_records(self.folder(job) / METRICS_FILE)
            if record["kind"] == "validation"
        ]

    def _figure(self, job):
        return f"validation {HEADLINE} {self.read(job)['validation']:.4f}"

    def _left(self, waiting, running, later):
        """Time for what waits, runs and comes later, from what runs have taken so far; words."""
        now = time.monotonic()
        if self._work == 0:
            return "an unknown time"
        pace = self._seconds / self._work
        active = sum(
            max(0.1 * pace * job.work, pace * job.work - (now - self._active[job]))
            for job in running
        )
        return duration(
            (active + pace * (later + sum(job.work for job in waiting)))
            / self.config.parallel
        )
