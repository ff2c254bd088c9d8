"""What a study trains: its settings, and the runs that follow from them, each a folder of its own."""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import InputError
from trainer.study.baselines import OURS, SYSTEMS


@dataclass(frozen=True)
class StudyConfig:
    """What a study is of.

    settings: `key=value` over the base, for every system. own: more of them for one system: {name: [...]}. tune: {key: values}:
    every system is trained with every combination on the first seed, and the one that is best by validation stands for it.
    sweep: {key: values}: SyNCRec with each of them. recbole: {RecBole's name of a model: its settings}. parallel: runs side by
    side; ranks: of each. keep_models: keep checkpoints of runs that have been evaluated.
    """

    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: list[str] = field(default_factory=list)
    own: dict[str, list[str]] = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    recbole: dict[str, dict[str, Any]] = field(default_factory=dict)
    recbole_epochs: int = 100
    recbole_patience: int = 5
    recbole_minutes: float = 0.0
    parallel: int = 1
    ranks: int = 1
    keep_models: bool = False

    def __post_init__(self):
        for name in (*self.systems, *self.own):
            if name not in SYSTEMS:
                raise ValueError(
                    f"there is no system {name!r}: there are {', '.join(SYSTEMS)}"
                )
        for name in ("parallel", "ranks", "recbole_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if (
            not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
            or min(self.seeds) < 0
        ):
            raise ValueError(
                f"seeds is {self.seeds}: give at least one, each once, 0 or more"
            )
        if not self.systems and not self.recbole:
            raise ValueError("systems is empty: a study needs one")
        if self.sweep and OURS not in self.systems:
            raise ValueError(f"sweep is of {OURS}, which is not among the systems")


@dataclass(frozen=True)
class Job:
    """One run. system: as in SYSTEMS, or RecBole's name; domain: of a model of one domain alone; variant: the settings that are
    tried; settings: all that launch/train.py is given beside base, data and run."""

    system: str
    seed: int
    domain: str = ""
    variant: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    recbole: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [self.system, self.domain, *self.variant, f"seed={self.seed}"]
        return "-".join(re.sub(r"[^\w.=,+-]+", "_", part) for part in parts if part)

    @property
    def work(self) -> float:
        """About, beside a run of SyNCRec."""
        return 1.0 if self.recbole else SYSTEMS[self.system].work


def jobs_of(
    config: StudyConfig, system: str, domains, seed: int, variant=()
) -> list[Job]:
    """The runs of a system with a seed: one, or one for each domain."""
    of = SYSTEMS[system]
    given = (
        *config.settings,
        *of.settings,
        *config.own.get(system, ()),
        *variant,
        f"seed={seed}",
    )
    if not of.by_domain:
        return [Job(system, seed, "", tuple(variant), given)]
    return [
        Job(system, seed, name, tuple(variant), (*given, f"stream.domain={name}"))
        for name in domains
    ]


def combinations(values: dict[str, list]) -> list[tuple[str, ...]]:
    """Every combination of `key: values` as key=value; without any, the one that changes nothing."""
    for key, given in values.items():
        if not isinstance(given, list) or not given:
            raise InputError(f"{key}: give a list of values")
    return [
        tuple(f"{key}={value}" for key, value in zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


def swept(config: StudyConfig, domains) -> list[tuple[str, Any, Job]]:
    """(key, value, run) of every sweep, on the first seed."""
    found = []
    for key, values in config.sweep.items():
        for value in values:
            (job,) = jobs_of(
                config, OURS, domains, config.seeds[0], (f"{key}={value}",)
            )
            found.append((key, value, job))
    return found


def recbole_jobs(config: StudyConfig) -> list[Job]:
    """Every model of RecBole with every seed."""
    return [
        Job(model, seed, recbole=True)
        for model in config.recbole
        for seed in config.seeds
    ]
