"""A study from its beginning to its report: hyperparameters tuned alike, all seeds, all results."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config.load import load_config
from trainer.config.study import OURS, StudyConfig
from trainer.data.format.dataset import Dataset
from trainer.data.split import Timeline
from trainer.errors import InputError
from trainer.files.atomic import write_json
from trainer.study.baselines import SYSTEMS, name_with_recency
from trainer.study.jobs import JobRunner
from trainer.study.plan import (
    Job,
    Settings,
    SweepPoint,
    check_settings,
    hyperparameter_grid,
    leave_out_same,
    make_jobs,
    make_recbole_jobs,
    make_sweeps,
)
from trainer.study.results import (
    Baselines,
    RunResult,
    SystemResults,
    collect_results,
    read_baselines,
    read_split,
)


class Trial(NamedTuple):
    """A combination of hyperparameters that was tried; domain: of a model of it alone, or ""."""

    domain: str
    settings: Settings
    validation: float


class SweepResult(NamedTuple):
    """SyNCRec with one value of a setting."""

    value: Any
    results: SystemResults


@dataclass(frozen=True)
class Study:
    """What a report is made of.

    results: by system. baselines: those that are not trained. best_settings: {system: {domain or "":
    the combination that stands for it}}. trials: by system. sweeps: by key. example: the folder
    of a run of SyNCRec, or None. failed: {name of a run: why}. unconverged: by system, the names of
    the runs whose best validation was the last one. min_users: test users of a domain that counts
    in means over domains (`evaluation.min_users`). split: by time, as evaluations' records have it;
    None of leave-one-out.
    """

    dataset: Dataset
    config: StudyConfig
    results: dict[str, SystemResults]
    baselines: Baselines
    best_settings: dict[str, dict[str, Settings]]
    trials: dict[str, list[Trial]]
    sweeps: dict[str, list[SweepResult]]
    example: Path | None
    failed: dict[str, str]
    unconverged: dict[str, list[str]]
    min_users: int
    split: dict[str, Any] | None = None

    @property
    def domain_names(self) -> list[str]:
        """All domains' names."""
        return [domain.name for domain in self.dataset.domains]

    @property
    def ours(self) -> str:
        """The name of SyNCRec's results that others are compared with: with the recency term, if any."""
        with_recency = name_with_recency(OURS)
        return with_recency if with_recency in self.results else OURS

    @property
    def users(self) -> np.ndarray:
        """Test users of each domain, int64 (D,): the same for every system."""
        for results in self.results.values():
            return results.users_of_domains(len(self.dataset.domains))
        return np.zeros(len(self.dataset.domains), np.int64)

    @property
    def counted(self) -> list[int]:
        """The numbers of the domains that count in means over domains."""
        for results in self.results.values():
            return results.counted_domains(
                len(self.dataset.domains), self.min_users
            )
        return []


def run_study(
    data: str | Path,
    output: str | Path,
    base: list[Path],
    config: StudyConfig,
    launch: str | Path,
    recbole_python: str | Path | None = None,
) -> Study:
    """Trains and evaluates all that is not there yet.

    data: a prepared dataset's folder. output: the study's folder. base: run configurations over
    one another. launch: the folder of train.py and evaluate.py. recbole_python: of RecBole's
    environment.

    Raises InputError where something given cannot be used, and RunStopped after a signal.
    """
    output = Path(output)
    dataset = Dataset.load(data)
    hyperparameter_grid(config.tune)  # raises where values are no list
    domains = [domain.name for domain in dataset.domains]
    check_settings(config, base, domains)
    config, same = leave_out_same(config, base)
    for name in same:
        print(f"{name}: changes nothing over this base, and is left out")
    _begin(output, dataset, config)
    run_config = load_config(base, config.settings)
    if config.recbole and run_config.split.kind == Timeline.name:
        raise InputError(
            f"recbole: {', '.join(config.recbole)} learn and rank by leave-one-out alone: leave them "
            "out, or split.kind=timeline"
        )
    runner = JobRunner(
        output,
        data,
        base,
        config,
        Path(launch),
        recbole_python,
        run_config.evaluation.min_users,
    )
    return _StudyRunner(dataset, config, runner).run()


def _begin(
    output: Path,
    dataset: Dataset,
    config: StudyConfig,
) -> None:
    """The study's folder, with its settings."""
    record = output / "study.json"
    if output.exists() and any(output.iterdir()) and not record.is_file():
        raise InputError(
            f"{output}: already holds something that is no study; give a new folder as "
            "--output"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        record, {"dataset": dataset.fingerprint, "config": asdict(config)}
    )


class _StudyRunner:
    """Tunes every system, runs all seeds, and collects the results."""

    def __init__(
        self,
        dataset: Dataset,
        config: StudyConfig,
        runner: JobRunner,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.runner = runner
        self.domains = [domain.name for domain in dataset.domains]
        self.sweeps = make_sweeps(config, self.domains)
        self.recbole_jobs = make_recbole_jobs(config)
        self.best_settings: dict[str, dict[str, Settings]] = {}
        self.trials: dict[str, list[Trial]] = {}
        self.unconverged: dict[str, list[str]] = {}

    def run(self) -> Study:
        """All runs, and what they found."""
        self._tune()
        runs_by_system = self._run_seeds()
        results = {}
        everyone = None
        example = None
        for name, runs in runs_by_system.items():
            finished = self._finished_runs(name, runs)
            if not finished:
                continue
            read = self._read(name, finished)
            results[name] = collect_results(name, read)
            results |= _with_recency(name, read)
            # The run of a model of all domains has ranked every user.
            if name in SYSTEMS and not SYSTEMS[name].by_domain:
                everyone = self.runner.folder(finished[0][0])
                if name == OURS:
                    example = everyone
        failed = {job.name: why for job, why in self.runner.failed.items()}
        return Study(
            dataset=self.dataset,
            config=self.config,
            results=results,
            baselines=read_baselines(everyone) if everyone else {},
            best_settings=self.best_settings,
            trials=self.trials,
            sweeps=self._sweep_results(),
            example=example,
            failed=failed,
            unconverged=self.unconverged,
            min_users=self.runner.min_users,
            split=read_split(everyone) if everyone else None,
        )

    def _tune(self) -> None:
        """Tries every combination of hyperparameters, on the first seed."""
        config = self.config
        grid = hyperparameter_grid(config.tune)
        jobs_by_system: dict[str, list[Job]] = {}
        for name in config.systems:
            jobs_by_system[name] = []
            for settings in grid:
                jobs_by_system[name] += make_jobs(
                    config,
                    name,
                    self.domains,
                    config.seeds[0],
                    settings,
                )
        all_jobs = []
        for jobs in jobs_by_system.values():
            all_jobs += jobs
        self.runner.run(all_jobs, self._work_after_tuning())
        for name, jobs in jobs_by_system.items():
            trials = self._read_trials(jobs)
            self.trials[name] = trials
            self.best_settings[name] = _select_best(trials)

    def _work_after_tuning(self) -> float:
        """Of the runs that come then, about."""
        other_seeds = len(self.config.seeds) - 1
        work = 0.0
        for name in self.config.systems:
            work += SYSTEMS[name].work * other_seeds
        for point in self.sweeps:
            work += point.job.work
        for job in self.recbole_jobs:
            work += job.work
        return work

    def _read_trials(self, jobs: list[Job]) -> list[Trial]:
        """Validations of the jobs that have not failed."""
        trials = []
        for job in jobs:
            if job not in self.runner.failed:
                validation = self.runner.read(job).validation
                trials.append(
                    Trial(
                        job.domain,
                        job.variant,
                        validation,
                    )
                )
        return trials

    def _run_seeds(self) -> dict[str, list[list[Job]]]:
        """Runs every system, sweep and model of RecBole: the jobs by system, then by seed."""
        runs: dict[str, list[list[Job]]] = {}
        for name in self.config.systems:
            runs[name] = []
        for seed in self.config.seeds:
            for name in self.config.systems:
                runs[name].append(self._final_jobs(name, seed))
        for model in self.config.recbole:
            runs[model] = []
        for job in self.recbole_jobs:
            runs[job.system].append([job])
        all_jobs = []
        for system_runs in runs.values():
            for jobs in system_runs:
                all_jobs += jobs
        all_jobs += [point.job for point in self.sweeps]
        self.runner.run(all_jobs)
        return runs

    def _final_jobs(
        self,
        name: str,
        seed: int,
    ) -> list[Job]:
        """A system's runs with the settings that stand for it."""
        jobs = []
        for domain, settings in self.best_settings[name].items():
            jobs += make_jobs(
                self.config,
                name,
                [domain],
                seed,
                settings,
            )
        return jobs

    def _finished_runs(
        self,
        name: str,
        runs: list[list[Job]],
    ) -> list[list[Job]]:
        """The seeds of which no run failed; none where a domain's model has no settings."""
        if name in self.best_settings:
            models = len(self.domains) if SYSTEMS[name].by_domain else 1
            if len(self.best_settings[name]) < models:
                return []
        finished = []
        for jobs in runs:
            failed = any(job in self.runner.failed for job in jobs)
            if jobs and not failed:
                finished.append(jobs)
        return finished

    def _read(
        self,
        name: str,
        runs: list[list[Job]],
    ) -> list[list[RunResult]]:
        """What a system's runs have left. runs: by seed, one job or one for each domain."""
        results = []
        unconverged = []
        for jobs in runs:
            read = [self.runner.read(job) for job in jobs]
            for job, result in zip(jobs, read, strict=True):
                if result.best_is_last:
                    unconverged.append(job.name)
            results.append(read)
        if unconverged:
            self.unconverged[name] = unconverged
        return results

    def _sweep_results(self) -> dict[str, list[SweepResult]]:
        """By key: SyNCRec with each value whose run has not failed."""
        by_key: dict[str, list[SweepResult]] = {}
        for point in self.sweeps:
            if point.job in self.runner.failed:
                continue
            name = _point_name(point)
            results = collect_results(name, self._read(name, [[point.job]]))
            points = by_key.setdefault(point.key, [])
            points.append(SweepResult(point.value, results))
        return by_key


def _with_recency(
    name: str, runs: list[list[RunResult]]
) -> dict[str, SystemResults]:
    """The results of a system with its recency term, by their name; nothing where a run has none."""
    with_term = []
    for parts in runs:
        of_seed = [part.with_recency() for part in parts]
        found = [result for result in of_seed if result is not None]
        if len(found) < len(parts):
            return {}
        with_term.append(found)
    full_name = name_with_recency(name)
    return {full_name: collect_results(full_name, with_term)}


def _point_name(point: SweepPoint) -> str:
    return f"{point.key}={point.value}"


def _select_best(trials: list[Trial]) -> dict[str, Settings]:
    """By domain, or of the one model (""): the settings that are best by validation."""
    best: dict[str, Trial] = {}
    for trial in trials:
        before = best.get(trial.domain)
        if before is None or trial.validation > before.validation:
            best[trial.domain] = trial
    return {domain: trial.settings for domain, trial in best.items()}
