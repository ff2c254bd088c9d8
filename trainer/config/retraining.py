"""Settings: a nightly job, and when a new model is published."""

from dataclasses import dataclass, field

from trainer.errors import InputError


@dataclass(frozen=True)
class PublishConfig:
    """When a candidate is published.

    tolerance: the share of the current model's NDCG@10 that it may lack in a domain. fall, domain_fall: the share that the mean
    over domains, or a domain's figure, may fall below the one at the current version's publication. own_fall: the same of how
    much higher an item is ranked for its own user than for another's. least_users: newest users of a domain for them to be
    judged by; with fewer, all its users are. keep: older versions that stay.
    """

    tolerance: float = 0.02
    fall: float = 0.2
    domain_fall: float = 0.4
    own_fall: float = 0.5
    least_users: int = 100
    keep: int = 5
    dtype: str = "fp32"

    def __post_init__(self):
        for name in ("tolerance", "fall", "domain_fall", "own_fall"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}: give a share from 0 to 1"
                )
        for name, least in (("least_users", 1), ("keep", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} is {getattr(self, name)}: give at least {least}"
                )


# What measured best on amazon4 (docs/retraining.md).
_WARM = (
    "epochs=2",
    "evaluation.every_epochs=2",
    "warm_kept=0.3",
    "optimizer.schedule=linear",
    "optimizer.final_share=0.2",
)


@dataclass(frozen=True)
class RetrainConfig:
    """A retraining. Logs and columns are those of launch/prepare.py, base and settings those of launch/train.py, and tolerance,
    fall, domain_fall, own_fall, least_users and keep those of launch/publish.py.

    warm_settings: besides, where there is a model to begin with. launcher: words before the scripts of training and publishing,
    e.g. [deepspeed, --hostfile, hosts]; empty: this Python. keep_days: days whose dataset and run stay, beside those that
    published versions are of.
    """

    folder: str = ""
    name: str = ""
    input: list[str] = field(default_factory=list)
    user_column: str = "user_id"
    item_column: str = "item_id"
    domain_column: str = "domain"
    time_column: str = "timestamp"
    domain: str = ""
    min_user: int = 0
    min_item: int = 0
    days: float = 0.0  # 0: all logs count
    time_unit: str = ""
    retire: bool = False
    memory: str = "8GB"
    base: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    warm_settings: list[str] = field(default_factory=lambda: list(_WARM))
    launcher: list[str] = field(default_factory=list)
    tolerance: float = 0.02
    fall: float = 0.2
    domain_fall: float = 0.4
    own_fall: float = 0.5
    least_users: int = 100
    keep: int = 5
    keep_days: int = 3

    def __post_init__(self):
        missing = {
            "folder": "gets datasets, runs and what is published",
            "name": "names this day, e.g. 2026-11-26",
        }
        for name, what in missing.items():
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: it {what}")
        if "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name is {self.name!r}: it names a folder, so without / and no dot first"
            )
        if not self.input:
            raise ValueError("input is missing: the new logs")
        if self.keep_days < 1:
            raise ValueError(f"keep_days is {self.keep_days}: give at least 1")
