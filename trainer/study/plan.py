"""The runs that follow from a study's settings: hyperparameter search, seeds, sweeps and baselines."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.load import load_config
from trainer.config.study import OURS, StudyConfig
from trainer.errors import InputError
from trainer.study.baselines import SYSTEMS

Settings = tuple[str, ...]  # `key=value` each


@dataclass(frozen=True)
class Job:
    """One run, with a folder of its own.

    system: a name in SYSTEMS, or RecBole's name of a model. domain: of a model of one domain
    alone. variant: the settings that are tried. settings: all that launch/train.py gets beside
    base, data and run.
    """

    system: str
    seed: int
    domain: str = ""
    variant: Settings = ()
    settings: Settings = ()
    recbole: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = []
        for part in (
            self.system,
            self.domain,
            *self.variant,
            f"seed={self.seed}",
        ):
            if part:
                parts.append(re.sub(r"[^\w.=,+-]+", "_", part))
        return "-".join(parts)

    @property
    def work(self) -> float:
        """How long it takes, about, beside a run of SyNCRec."""
        if self.recbole:
            return 1.0
        return SYSTEMS[self.system].work


class SweepPoint(NamedTuple):
    """A run of SyNCRec with one value of a setting."""

    key: str
    value: Any
    job: Job


def make_jobs(
    config: StudyConfig,
    name: str,
    domains: Sequence[str],
    seed: int,
    variant: Settings = (),
) -> list[Job]:
    """The runs of a system with a seed: one, or one for each domain."""
    system = SYSTEMS[name]
    settings = (
        *_settings_of(config, name),
        *variant,
        f"seed={seed}",
    )
    if not system.by_domain:
        return [Job(name, seed, "", variant, settings)]
    jobs = []
    for domain in domains:
        domain_settings = (*settings, f"stream.domain={domain}")
        jobs.append(
            Job(
                name,
                seed,
                domain,
                variant,
                domain_settings,
            )
        )
    return jobs


def leave_out_same(
    config: StudyConfig,
    base: Sequence[Path],
) -> tuple[StudyConfig, list[str]]:
    """The study without the ablations that change nothing over this base, and their names.

    Where the base has no SC-MIM, SyNCRec without it is SyNCRec.
    """
    if OURS not in config.systems:
        return config, []
    ours = load_config(base, _settings_of(config, OURS))
    kept = []
    same = []
    for name in config.systems:
        is_same = SYSTEMS[name].ablation and ours == load_config(
            base, _settings_of(config, name)
        )
        (same if is_same else kept).append(name)
    return replace(config, systems=kept), same


def _settings_of(config: StudyConfig, name: str) -> Settings:
    """What a system has over the base."""
    return (
        *config.settings,
        *SYSTEMS[name].settings,
        *config.own.get(name, ()),
    )


def hyperparameter_grid(tune: dict[str, list[Any]]) -> list[Settings]:
    """Every combination of `key: values` as settings, for a grid search.

    Without any key: the one combination that changes nothing. Raises InputError where the values
    of a key are no list.
    """
    for key, values in tune.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{key}: give a list of values")
    grid = []
    for combination in itertools.product(*tune.values()):
        settings = []
        for key, value in zip(tune, combination, strict=True):
            settings.append(f"{key}={value}")
        grid.append(tuple(settings))
    return grid


def make_sweeps(
    config: StudyConfig,
    domains: Sequence[str],
) -> list[SweepPoint]:
    """The runs of every sweep, on the first seed."""
    points = []
    for key, values in config.sweep.items():
        for value in values:
            variant = (f"{key}={value}",)
            (job,) = make_jobs(
                config,
                OURS,
                domains,
                config.seeds[0],
                variant,
            )
            points.append(SweepPoint(key, value, job))
    return points


def make_recbole_jobs(config: StudyConfig) -> list[Job]:
    """Every model of RecBole with every seed."""
    jobs = []
    for model in config.recbole:
        for seed in config.seeds:
            jobs.append(Job(model, seed, recbole=True))
    return jobs


def check_settings(
    config: StudyConfig,
    base: Sequence[Path],
    domains: Sequence[str],
) -> None:
    """Raises InputError for settings that no run of the study can have, before there is one.

    A value of `tune` may suit some systems and not others, whose runs then fail; one that suits
    none is refused.
    """
    for name in config.systems:
        _check_jobs(config, base, domains, [name], ())
    for variant in _each_value(config.tune):
        _check_jobs(
            config,
            base,
            domains,
            config.systems,
            variant,
        )
    for point in make_sweeps(config, domains):
        load_config(base, point.job.settings)


def _check_jobs(
    config: StudyConfig,
    base: Sequence[Path],
    domains: Sequence[str],
    systems: Sequence[str],
    variant: Settings,
) -> None:
    """Raises InputError where none of these systems takes the variant."""
    refusal = None
    for name in systems:
        job = make_jobs(
            config,
            name,
            domains[:1],
            config.seeds[0],
            variant,
        )[0]
        try:
            load_config(base, job.settings)
            return
        except InputError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _each_value(tune: dict[str, list[Any]]) -> Iterator[Settings]:
    """Each value of a grid once, beside the first values of the other keys.

    {a: [1, 2], b: [3, 4]}    a=1 b=3    a=2 b=3    a=1 b=4
    """
    grid = hyperparameter_grid(
        {key: values[:1] for key, values in tune.items()}
    )
    first = grid[0]
    if first:
        yield first
    for number, (key, values) in enumerate(tune.items()):
        for value in values[1:]:
            settings = list(first)
            settings[number] = f"{key}={value}"
            yield tuple(settings)
