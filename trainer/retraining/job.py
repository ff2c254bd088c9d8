"""Nightly retraining as one job: extends the dataset, trains from the model that serves, publishes.

    FOLDER/days/NAME/plan.json      what this retraining began from: fixed when it first began
    FOLDER/days/NAME/dataset        the dataset with the new logs
    FOLDER/days/NAME/arrivals.json  how the model that serves ranks what is new (prequential.py)
    FOLDER/days/NAME/run            the run (warm start)
    FOLDER/days/NAME/retrain.json   how it ended; report.md says it in words
    FOLDER/published                what serves (trainer/retraining/published.py)

Each stage leaves something that the next call sees: killed anywhere, the same command goes on from
there. The logs of a day that is refused come along with the next day (trainer/retraining/carried.py).
A day that was rolled back stays out of what follows, and its logs may be given again. What a stage
has done is read from what it left: a launcher's status may say anything.

This process loads neither PyTorch nor an engine; the stages are processes of their own.
"""

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.child_processes import StoppableCommands
from trainer.config.prepare import LOG_FORM_SETTINGS
from trainer.config.retraining import RetrainConfig
from trainer.errors import InputError, RunStopped
from trainer.files.atomic import write_json, write_text
from trainer.files.lock import wait_for_lock
from trainer.reporting.run_log import read_records
from trainer.retraining.carried import find_carried_logs
from trainer.retraining.changes_report import changes_report, describe_carried
from trainer.retraining.day import (
    DAYS,
    PLAN,
    PUBLISHED,
    Day,
    read_arrivals,
    read_json,
    read_results,
)
from trainer.retraining.item_drift import measure_drift
from trainer.retraining.published import (
    locate_run,
    read_current_version,
    version_folder,
)
from trainer.retraining.report import write_days
from trainer.run_files import (
    CURRENT,
    LOCK,
    METRICS_FILE,
    MODEL,
    REFUSED,
    VERSION,
    VERSIONS,
)

_SCRIPTS = Path(__file__).resolve().parents[2] / "launch"
_NO_TEST_RECORD = "holds no test record: its own lines say why; the same command goes on there"
_NEITHER = (
    "neither serves nor was refused: its own lines say why; the same command goes on "
    "there"
)
# What a plan may say; its entries become words of commands.
_PLAN_FORMS = {
    "extends": r"days/(?!\.)[^/]+/dataset",
    "before": r"versions/\d+/model",
    "warm_start": r"(?!.*\$\{).+",  # a run's folder may lie anywhere
}


def retrain(
    config: RetrainConfig,
    scripts: Path = _SCRIPTS,
) -> dict[str, Any]:
    """Does what is left of the day's stages, and returns the content of its retrain.json.

    scripts: the folder of launch/*.py.

    Raises InputError where another retraining is at work in the folder, where a stage failed (its
    own lines say why), or where the folder cannot be written.
    """
    folder = Path(config.folder).resolve()
    day = Day(folder, config.name)
    with _exclusive_folder(folder):
        if day.result.is_file():
            return read_json(day.result)
        return _Retraining(config, day, scripts).run()


class _Retraining:
    """The stages of one day, each a process of its own whose output is this one's."""

    def __init__(
        self,
        config: RetrainConfig,
        day: Day,
        scripts: Path,
    ) -> None:
        self.config = config
        self.day = day
        self.scripts = scripts
        self.plan = _begin_plan(config, day)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All stages, then the reports. The result is written last: the day is done then."""
        day = self.day
        self._extend_dataset()
        self._score_arrivals()
        self._train()
        published = self._publish()
        result = self._describe_result(published)
        write_text(day.report, changes_report(result))
        write_days(day.folder, read_results(day.folder, result))
        write_json(day.result, result)
        _remove_old_days(day.folder, self.config.keep_days)
        return result

    def _extend_dataset(self) -> None:
        """Makes the day's dataset; done where its folder is there."""
        if self.day.dataset.is_dir():
            return
        for line in describe_carried(self.plan):
            print(line, flush=True)
        arguments = _prepare_arguments(
            self.config,
            self.plan,
            self.day,
        )
        command = [sys.executable, self.scripts / "prepare.py", *arguments]
        self._run_stage("extending the dataset", command)

    def _score_arrivals(self) -> None:
        """Ranks the day's events by the model that serves, before a model learns from them.

        Done where its file is there. Says why where nothing was ranked.
        """
        day = self.day
        if not day.arrivals.is_file():
            self._make_arrivals()
        skipped = read_arrivals(day.arrivals).get("skipped")
        if skipped is not None:
            print(f"the day's events are not ranked: {skipped}", flush=True)

    def _make_arrivals(self) -> None:
        """Leaves the record of the day's events."""
        day = self.day
        if self.plan["warm_start"] is None:
            write_json(day.arrivals, {"skipped": "no model served yet"})
        else:
            arguments = _score_arguments(self.plan, day)
            command = [
                *self._launcher(),
                self.scripts / "evaluate.py",
                *arguments,
            ]
            self._run_stage(
                "ranking the day's events", command, day.arrivals.is_file
            )
        if not day.arrivals.is_file():
            raise InputError(
                "ranking the day's events ended with status 0, but "
                f"{day.arrivals} is not there: its own lines say why; the same command goes on "
                "there"
            )

    def _train(self) -> None:
        """Trains the day's run to its end. Raises InputError where it left no test record."""
        if self.day.trained.exists():
            return
        arguments = _train_arguments(
            self.config,
            self.plan,
            self.day,
        )
        command = [*self._launcher(), self.scripts / "train.py", *arguments]
        self._run_stage("training", command)
        if not _is_tested(self.day.run):
            raise InputError(
                f"training ended with status 0, but {self.day.run} {_NO_TEST_RECORD}"
            )
        self.day.trained.touch()

    def _publish(self) -> bool:
        """Whether the day's candidate serves now; it was refused otherwise."""
        arguments = _publish_arguments(self.config, self.day)
        command = [*self._launcher(), self.scripts / "publish.py", *arguments]
        self._run_stage(
            "publishing",
            command,
            self._is_decided,
        )
        published = self._serves()
        if not published and not self._is_refused():
            raise InputError(
                f"publishing ended with status 0, but {self.day.run} {_NEITHER}"
            )
        return published

    def _launcher(self) -> list[str]:
        """Words before the scripts that may run as several ranks."""
        return self.config.launcher or [sys.executable]

    def _run_stage(
        self,
        stage: str,
        command: list[str | Path],
        is_expected: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs a command, and notes its seconds.

        Raises InputError for any status but 0, unless `is_expected` says that it is no failure.
        """
        now = time.strftime("%H:%M:%S")
        print(f"[{now}] {stage}", flush=True)
        begun = time.monotonic()
        with StoppableCommands() as commands:
            status = commands.run(command)
        self.seconds[stage] = time.monotonic() - begun
        if commands.stopped:
            raise RunStopped(
                f"{stage} was stopped, as asked; the same command goes on there"
            )
        if status and not is_expected():
            raise InputError(
                f"{stage} ended with status {status}: its own lines say why; the same "
                "command goes on there"
            )

    def _is_decided(self) -> bool:
        """Whether the day's candidate serves or was refused."""
        return self._serves() or self._is_refused()

    def _serves(self) -> bool:
        """Whether this day's candidate is the version that serves."""
        current = read_current_version(self.day.published)
        if current is None:
            return False
        return Path(current["run"]) == self.day.run.resolve()

    def _is_refused(self) -> bool:
        """Whether this day's candidate is the one that was refused last."""
        file = self.day.published / REFUSED
        if not file.is_file():
            return False
        run = locate_run(read_json(file), self.day.published)
        return run == self.day.run.resolve()

    def _describe_result(self, published: bool) -> dict[str, Any]:
        """What retrain.json says."""
        record = None
        if published:
            record = read_current_version(self.day.published)
        version = None
        drift = {}
        if record is None:
            record = read_json(self.day.published / REFUSED)
        else:
            version = record["number"]
            drift = self._measure_drift(version)
        return {
            "name": self.config.name,
            "number": self.plan["number"],
            "published": version,
            "reasons": record["reasons"],
            "notes": record.get("notes", []),
            "warnings": record.get("warnings", []),
            "below_recency": record.get("below_recency", []),
            "arrivals": read_arrivals(self.day.arrivals),
            "carried": self.plan.get("carried", []),
            "left_out": self.plan.get("left_out", []),
            "domains": record["domains"],
            "min_users": record.get("min_users", 1),
            "extension": self.day.read_extension(),
            "drift": drift,
            "seconds": self.seconds,
        }

    def _measure_drift(self, number: str) -> dict[str, Any]:
        """How far items moved from the model that served when the day began."""
        if self.plan["before"] is None:
            return {}
        before = self.day.published / self.plan["before"]
        if not before.is_dir():
            return {}
        return measure_drift(
            before, version_folder(self.day.published, number) / MODEL
        )


def _begin_plan(
    config: RetrainConfig,
    day: Day,
) -> dict[str, Any]:
    """What the retraining begins from; a later call of the same day gets the first one's."""
    if day.plan.is_file():
        plan = read_json(day.plan)
        _check_plan(day.plan, plan)
        difference = _find_difference(plan, config)
        if difference is None:
            return plan
        if day.dataset.is_dir():
            raise InputError(
                f"{day.path}: was begun with {difference}: give that, or another name"
            )
        # No dataset was made of it: a slip is corrected under the same name.
        shutil.rmtree(day.path)
    plan = _make_plan(config, day)
    _check_plan(day.plan, plan)
    day.path.mkdir(parents=True, exist_ok=True)
    write_json(day.plan, plan)
    return plan


def _find_difference(plan: dict[str, Any], config: RetrainConfig) -> str | None:
    """What a day was begun with and is not given now; None where that is the same.

    input ['a.parquet'], not ['b.parquet']
    """
    for name, now in (
        ("input", config.input),
        ("leave_out", config.leave_out),
    ):
        before = plan.get(name, [])
        if before != now:
            return f"{name} {before}, not {now}"
    return None


def _make_plan(
    config: RetrainConfig,
    day: Day,
) -> dict[str, Any]:
    """A plan that begins with the version that serves now (warm start)."""
    newest = 0
    for file in day.folder.glob(f"{DAYS}/*/{PLAN}"):
        newest = max(newest, read_json(file)["number"])
    current = read_current_version(day.published)
    base = _find_base_day(day.folder, current)
    carried = find_carried_logs(day.folder, base, config.leave_out)
    extends = None
    if carried.extends is not None:
        extends = f"{DAYS}/{carried.extends}/dataset"
    warm_start = None
    before = None
    if current is not None:
        warm_start = current["run"]
        pointer = json.loads(
            (day.published / CURRENT).read_text(encoding="utf-8")
        )
        before = pointer["model"]
    return {
        "name": config.name,
        "input": config.input,
        "number": newest + 1,
        "base": None if base is None else base["name"],
        "extends": extends,
        "carried": carried.days,
        "again": carried.again,
        "leave_out": config.leave_out,
        "left_out": carried.left_out,
        "warm_start": warm_start,
        "before": before,
    }


def _check_plan(
    file: Path,
    plan: dict[str, Any],
) -> None:
    """Raises InputError where a record in the folder has led the plan elsewhere."""
    for name, form in _PLAN_FORMS.items():
        entry = plan.get(name)
        if entry is None:
            continue
        if not (isinstance(entry, str) and re.fullmatch(form, entry)):
            raise InputError(
                f"{file}: {name} is {entry!r}, which no retraining here writes: remove "
                "the day's folder"
            )
    again = plan.get("again", [])
    is_list = isinstance(again, list)
    if not is_list or not all(isinstance(name, str) for name in again):
        raise InputError(
            f"{file}: again is {again!r}, which no retraining here writes: remove the "
            "day's folder"
        )
    if not isinstance(plan.get("number"), int):
        raise InputError(
            f"{file}: its number is {plan.get('number')!r}: remove the day's folder"
        )


def _find_base_day(
    folder: Path,
    current: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The result of the day whose model serves.

    Where another run's model serves: of the newest day that was published.
    """
    published = [
        result for result in read_results(folder) if result["published"]
    ]
    for result in published:
        run = Day(folder, result["name"]).run.resolve()
        if current is not None and run == Path(current["run"]):
            return result
    return published[-1] if published else None


def _prepare_arguments(
    config: RetrainConfig,
    plan: dict[str, Any],
    day: Day,
) -> list[Any]:
    """Of launch/prepare.py."""
    words: list[Any] = ["--input", *plan.get("again", []), *config.input]
    words += ["--output", day.dataset]
    words += ["--keep-log"]
    words += ["--memory", config.memory]
    words += ["--user-column", config.user_column]
    words += ["--item-column", config.item_column]
    words += ["--domain-column", config.domain_column]
    words += ["--time-column", config.time_column]
    words += ["--min-user", config.min_user]
    words += ["--min-item", config.min_item]
    words += ["--min-domain", config.min_domain]
    words += ["--bad-rows", config.bad_rows]
    for name in LOG_FORM_SETTINGS:
        value = getattr(config, name)
        if value:
            words += [f"--{name.replace('_', '-')}={value}"]
    if config.domain:
        words += ["--domain", config.domain]
    if config.days:
        words += ["--days", config.days]
    if config.time_unit:
        words += ["--time-unit", config.time_unit]
    if plan["extends"] is not None:
        words += ["--extend", day.folder / plan["extends"]]
        if config.retire:
            words += ["--retire"]
    return words


def _score_arguments(
    plan: dict[str, Any],
    day: Day,
) -> list[Any]:
    """Of launch/evaluate.py."""
    # --of: torchrun takes --run for the beginning of an option of its own.
    words: list[Any] = ["--of", _begins_with(plan, day)]
    words += ["--data", day.dataset]
    words += ["--split", "arrivals"]
    words += ["--record", day.arrivals]
    return words


def _begins_with(plan: dict[str, Any], day: Day) -> Path:
    """The run whose model serves when the day begins."""
    return locate_run({"run": plan["warm_start"]}, day.published)


def _train_arguments(
    config: RetrainConfig,
    plan: dict[str, Any],
    day: Day,
) -> list[Any]:
    """Of launch/train.py."""
    words: list[Any] = []
    for file in config.base:
        words += ["--config", file]
    words += [f"data={day.dataset}"]
    words += [f"run={day.run}"]
    words += config.settings
    if plan["warm_start"] is not None:
        words += [f"warm_start={_begins_with(plan, day)}"]
        words += config.warm_settings
    return words


def _publish_arguments(
    config: RetrainConfig,
    day: Day,
) -> list[Any]:
    """Of launch/publish.py."""
    words: list[Any] = ["--candidate", day.run]
    words += ["--to", day.published]
    words += ["--tolerance", config.tolerance]
    words += ["--fall", config.fall]
    words += ["--domain-fall", config.domain_fall]
    words += ["--own-fall", config.own_fall]
    words += ["--least-users", config.least_users]
    words += ["--level", config.level]
    words += ["--below-recency", config.below_recency]
    words += ["--arrivals", day.arrivals]
    words += ["--keep", config.keep]
    return words


def _is_tested(run: Path) -> bool:
    """Whether a run has come to its end, which is when its best model is tested."""
    try:
        records = read_records(run / METRICS_FILE)
    except OSError:
        return False
    return any(record["kind"] == "test" for record in records)


def _remove_old_days(
    folder: Path,
    keep_days: int,
) -> None:
    """Removes datasets and runs, but for those of the newest days and of published versions."""
    runs = set()
    versions = folder / PUBLISHED / VERSIONS
    for file in versions.glob(f"*/{VERSION}"):
        runs.add(locate_run(read_json(file), folder / PUBLISHED))
    for result in read_results(folder)[:-keep_days]:
        day = Day(folder, result["name"])
        if day.run.resolve() not in runs:
            shutil.rmtree(day.dataset, ignore_errors=True)
            shutil.rmtree(day.run, ignore_errors=True)


@contextlib.contextmanager
def _exclusive_folder(folder: Path) -> Iterator[None]:
    """Within it no other process retrains in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = wait_for_lock(folder / LOCK)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}"
        ) from None
    if lock is None:
        raise InputError(
            f"{folder}: another retraining is at work here: wait for it or stop it"
        )
    with lock:
        yield
