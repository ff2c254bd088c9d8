"""A study from its beginning to its report: opponents tuned alike, all seeds, what was found."""

from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.data.format.dataset import Dataset
from trainer.errors import InputError
from trainer.files.atomic import write_json
from trainer.study.baselines import OURS, SYSTEMS
from trainer.study.jobs import Jobs
from trainer.study.plan import (
    Job,
    StudyConfig,
    combinations,
    jobs_of,
    recbole_jobs,
    swept,
)
from trainer.study.results import Found, gathered, popularity


@dataclass(frozen=True)
class Study:
    """What a report is made of.

    found: {system: Found}; popularity: as `results.popularity`, or None; chosen: {system: {domain or "": the combination that
    stands for it}}; tried: {system: [(domain, combination, validation)]}; sweeps: {key: [(value, Found)]}; example: the folder
    of a run of SyNCRec, or None; failed: {name of a run: why}.
    """

    dataset: Dataset
    config: StudyConfig
    found: dict[str, Found]
    popularity: dict | None
    chosen: dict[str, dict[str, tuple[str, ...]]]
    tried: dict[str, list[tuple[str, tuple[str, ...], float]]]
    sweeps: dict[str, list[tuple[object, Found]]]
    example: Path | None
    failed: dict[str, str]


def run_study(
    data, output, base, config: StudyConfig, launch, recbole_python=None
) -> Study:
    """Trains and evaluates all that is not there yet. output: the study's folder; base: run configurations over one another.

    Raises InputError where something given cannot be used, Stopped where the process was asked to stop.
    """
    output, dataset = Path(output), Dataset.load(data)
    if (
        output.exists()
        and any(output.iterdir())
        and not (output / "study.json").is_file()
    ):
        raise InputError(
            f"{output}: already holds something that is no study; give a new folder as --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "study.json",
        {"dataset": dataset.fingerprint, "config": asdict(config)},
    )
    jobs = Jobs(output, data, base, config, Path(launch), recbole_python)
    domains = [domain.name for domain in dataset.domains]
    grid, first = combinations(config.tune), config.seeds[0]
    later = sum(SYSTEMS[name].work for name in config.systems) * (len(config.seeds) - 1)
    sweeps, peers = swept(config, domains), recbole_jobs(config)
    later += sum(job.work for *_, job in sweeps) + sum(job.work for job in peers)
    trials = {
        name: [
            job for one in grid for job in jobs_of(config, name, domains, first, one)
        ]
        for name in config.systems
    }
    jobs.run([job for trial in trials.values() for job in trial], later)
    chosen, tried = {}, {}
    for name, trial in trials.items():
        chosen[name], tried[name] = _chosen(jobs, trial)
    final = {name: [] for name in config.systems}
    for seed in config.seeds:
        for name in config.systems:
            of = [
                job
                for domain, one in chosen[name].items()
                for job in jobs_of(config, name, [domain], seed, one)
            ]
            final[name].append(of)
    final |= {
        model: [[job] for job in peers if job.system == model]
        for model in config.recbole
    }
    jobs.run(
        [job for runs in final.values() for run in runs for job in run]
        + [job for *_, job in sweeps]
    )
    found, everyone, example = {}, None, None
    for name, runs in final.items():
        whole = [
            run for run in runs if run and not any(job in jobs.failed for job in run)
        ]
        if whole and not (
            name in chosen
            and len(chosen[name]) < (len(domains) if SYSTEMS[name].by_domain else 1)
        ):
            found[name] = gathered(
                name, [[jobs.read(job) for job in run] for run in whole]
            )
            if (
                name in SYSTEMS and not SYSTEMS[name].by_domain
            ):  # it has ranked everyone
                everyone = jobs.folder(whole[0][0])
                example = everyone if name == OURS else example
    by_key = {}
    for key, value, job in sweeps:
        if job not in jobs.failed:
            by_key.setdefault(key, []).append(
                (value, gathered(f"{key}={value}", [[jobs.read(job)]]))
            )
    return Study(
        dataset=dataset,
        config=config,
        found=found,
        popularity=popularity(everyone) if everyone else None,
        chosen=chosen,
        tried=tried,
        sweeps=by_key,
        example=example,
        failed={job.name: why for job, why in jobs.failed.items()},
    )


def _chosen(jobs: Jobs, trial: list[Job]):
    """The best combination by validation of each domain's model, or of the one model; and all that were tried."""
    best, tried = {}, []
    for job in trial:
        if job in jobs.failed:
            continue
        validation = jobs.read(job)["validation"]
        tried.append((job.domain, job.variant, validation))
        if job.domain not in best or validation > best[job.domain][0]:
            best[job.domain] = validation, job.variant
    return {domain: variant for domain, (_, variant) in best.items()}, tried
