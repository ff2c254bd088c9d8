"""Settings: a study, which compares SyNCRec with its ablations and with baselines."""

from dataclasses import dataclass, field
from typing import Any

OURS = "SyNCRec"
ALL_PARTS = "SyNCRec, all parts"
SINGLE_DOMAIN = "SDSR"

# In the order of a report's tables; trainer/study/baselines.py says what each of them is.
SYSTEM_NAMES = (
    OURS,
    "w/o LC-NTG",
    "w/o SC-MIM",
    "w/o stop-gradient",
    ALL_PARTS,
    SINGLE_DOMAIN,
    "w/o time",
    "CDSR",
    "MMoE",
    "MMoE, timed",
    "CGRec",
    "SASRec",
    "SASRec, timed",
    "GRU4Rec",
)


@dataclass(frozen=True)
class StudyConfig:
    """What a study compares.

    systems: names in SYSTEM_NAMES. settings: `key=value` over the base, for every system.
    own: more of them for one system: {name: [...]}. tune: a grid of hyperparameters, {key:
    values}: every system is trained with every combination on the first seed, and the best by
    validation stands for it. sweep: {key: values}: SyNCRec with each value. recbole: {RecBole's
    name of a model: its settings}. parallel: runs side by side. ranks: processes of each run.
    keep_models: keep checkpoints of runs that have been evaluated.
    """

    systems: list[str] = field(default_factory=lambda: list(SYSTEM_NAMES))
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

    def __post_init__(self) -> None:
        for name in (*self.systems, *self.own):
            if name not in SYSTEM_NAMES:
                known = ", ".join(SYSTEM_NAMES)
                raise ValueError(
                    f"there is no system {name!r}: there are {known}"
                )
        for name in ("parallel", "ranks", "recbole_epochs"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        repeated = len(set(self.seeds)) < len(self.seeds)
        if not self.seeds or repeated or min(self.seeds) < 0:
            raise ValueError(
                f"seeds is {self.seeds}: give at least one, each once, 0 or more"
            )
        if not self.systems and not self.recbole:
            raise ValueError("systems is empty: a study needs one")
        if self.sweep and OURS not in self.systems:
            raise ValueError(
                f"sweep is of {OURS}, which is not among the systems"
            )
