"""Settings: a nightly retraining, and when a new model is published."""

from dataclasses import dataclass

from trainer.config.setting import setting
from trainer.errors import InputError

WARN = "warn"
REFUSE = "refuse"


@dataclass(frozen=True)
class PublicationRules:
    """What a candidate must reach to be published, and how many versions stay."""

    tolerance: float = setting(
        0.02, "the share of the current model's NDCG@10 that a domain may lack"
    )
    fall: float = setting(
        0.2,
        "the share that the mean may fall since the current version's publication",
    )
    domain_fall: float = setting(0.4, "the same share for each domain")
    own_fall: float = setting(
        0.5,
        "the same of how much higher an item ranks for its own user than for others",
    )
    least_users: int = setting(
        50, "newest users that judge a domain; with fewer, all its users do"
    )
    level: float = setting(
        0.05,
        "the chance of a refusal on a day on which nothing is worse, all tests together",
    )
    below_recency: str = setting(
        WARN,
        "where the served model ranks the day's events below recency popularity",
        choices=(WARN, REFUSE),
    )
    keep: int = setting(5, "older versions that stay")


@dataclass(frozen=True)
class PublishConfig(PublicationRules):
    """When a candidate is published. A share is of the figure that it is compared with."""

    dtype: str = setting(
        "fp32", "of the item vectors", choices=("fp32", "fp16")
    )

    def __post_init__(self) -> None:
        for name in ("tolerance", "fall", "domain_fall", "own_fall"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}: give a share from 0 to 1")
        if not 0 < self.level < 1:
            raise InputError(
                f"level is {self.level}: give a chance between 0 and 1"
            )
        if self.least_users < 1:
            raise InputError(
                f"least_users is {self.least_users}: give at least 1"
            )
        if self.keep < 0:
            raise InputError(f"keep is {self.keep}: give at least 0")


# What measured best on amazon4 (docs/retrain.md).
_WARM_SETTINGS = (
    "epochs=2",
    "evaluation.every_epochs=2",
    "warm_kept=0.3",
    "optimizer.schedule=linear",
    "optimizer.final_share=0.2",
)


def _warm_settings() -> list[str]:
    return list(_WARM_SETTINGS)


@dataclass(frozen=True)
class _DaySettings:
    """What a retraining prepares (launch/prepare.py) and trains (launch/train.py)."""

    folder: str = setting(
        "", "the folder that gets datasets, runs and versions"
    )
    name: str = setting("", "names this day, e.g. 2026-11-26")
    input: list[str] = setting(list, "the new logs: files, folders or globs")
    user_column: str = setting("user_id", "the logs' column of users")
    item_column: str = setting("item_id", "the logs' column of items")
    domain_column: str = setting("domain", "the logs' column of domains")
    time_column: str = setting("timestamp", "the logs' column of times")
    domain: str = setting("", "the one domain of logs without a domain column")
    columns: str = setting(
        "", "all columns of logs without a header line, with commas between"
    )
    delimiter: str = setting(
        "", "what divides the fields; empty: by the file's ending"
    )
    time_format: str = setting("", "of times in text, e.g. %d/%m/%Y %H:%M")
    where: str = setting("", "rows that count, e.g. rating >= 4")
    items: str = setting("", "a file with the domain of every item")
    items_columns: str = setting(
        "", "all columns of an items file without a header line"
    )
    items_delimiter: str = setting("", "what divides the fields of items")
    domain_separator: str = setting(
        "", "what stands between several domains of one item"
    )
    bad_rows: str = setting(
        "stop",
        "at a row that cannot be used; skip counts and lists them",
        choices=("stop", "skip"),
    )
    min_user: int = setting(0, "drop users with fewer interactions")
    min_item: int = setting(0, "drop items with fewer interactions")
    min_domain: int = setting(
        0, "leave out new domains with fewer interactions or one item"
    )
    days: float = setting(
        0.0, "days before the newest row that count; 0: all logs count"
    )
    time_unit: str = setting("", "of times that are numbers, for days")
    retire: bool = setting(
        False, "items without an event left give up their rows"
    )
    memory: str = setting("8GB", "of all preparing processes together")
    base: list[str] = setting(list, "presets or YAML files of the run")
    settings: list[str] = setting(list, "key=value of the run, over the files")
    warm_settings: list[str] = setting(
        _warm_settings,
        "besides, where there is a model to begin with (warm start)",
    )
    launcher: list[str] = setting(
        list, "words before the scripts, e.g. [deepspeed, --hostfile, hosts]"
    )


@dataclass(frozen=True)
class RetrainConfig(PublicationRules, _DaySettings):
    """A retraining: what it prepares (launch/prepare.py), trains (launch/train.py) and publishes."""

    leave_out: list[str] = setting(
        list,
        "refused days whose logs do not come along, e.g. [2026-11-25]",
    )
    keep_days: int = setting(
        3,
        "days whose dataset and run stay, besides those of published versions",
    )

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError(
                "folder is missing: it gets datasets, runs and what is published"
            )
        if not self.name:
            raise ValueError(
                "name is missing: it names this day, e.g. 2026-11-26"
            )
        if "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name is {self.name!r}: it names a folder, so without / and no dot first"
            )
        if not self.input:
            raise ValueError("input is missing: the new logs")
        if self.keep_days < 1:
            raise ValueError(f"keep_days is {self.keep_days}: give at least 1")
