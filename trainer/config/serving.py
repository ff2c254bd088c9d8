"""Settings: what is recommended (batch inference), to whom, and how a model is exported."""

from dataclasses import dataclass

from trainer.config.prepare import LogFormat, memory_bytes
from trainer.errors import InputError

ITEM_DTYPES = ("fp32", "fp16")


@dataclass(frozen=True)
class ExportConfig:
    """How a trained model is exported for a service.

    faiss: an index of each domain's items by FAISS's name for it (Flat, HNSW32, …), or None.
    Whether FAISS knows that name, `trainer.serving.export.check_faiss` says. recency_term: with
    the model's recency term; None: as the run's evaluation.recency_term says.
    """

    dtype: str = "fp32"  # of the item vectors
    faiss: str | None = None
    recency_term: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_DTYPES:
            allowed = " or ".join(ITEM_DTYPES)
            raise InputError(f"dtype is {self.dtype!r}: give {allowed}")


@dataclass(frozen=True)
class RecommendConfig:
    """What is recommended.

    k: items for each user and domain. domains: their names; empty: all domains of the run.
    keep_seen: items of the user's history may be recommended too. recency_term: score by the model
    with its recency term (docs/evaluate.md), as of the day after the dataset's last; None: as the
    run's evaluation.recency_term says.
    """

    k: int = 10
    domains: tuple[str, ...] = ()
    keep_seen: bool = False
    recency_term: bool | None = None
    batch_size: int = 512  # users that each rank scores at once

    def __post_init__(self) -> None:
        for name in ("k", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}: give at least 1")


@dataclass(frozen=True)
class HistoriesConfig(LogFormat):
    """Which users get recommendations, and where their histories are read.

    inputs: logs. Without any, histories come from the run's dataset, with the validation and
    test items. users: one file (Parquet, CSV or TSV) whose `user_column` names the wanted users;
    None: all users. log_domain: the one domain of logs without a domain column. memory: limit
    for reading logs, e.g. 8GB (`trainer.serving.user_histories.check_memory`).
    """

    inputs: tuple[str, ...] = ()
    users: str | None = None
    log_domain: str | None = None
    memory: str = "8GB"
    part_users: int = 65536  # users in each file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part_users < 1:
            raise InputError(
                f"part_users is {self.part_users}: it must be at least 1"
            )
        self.check_domain("log_domain", self.log_domain)


@dataclass(frozen=True)
class RefreshConfig(LogFormat):
    """Which newer logs bring the counts of an export up to date.

    inputs: logs, or one prepared dataset that has them. log_domain: the one domain of logs without a
    domain column. memory: limit for reading logs, e.g. 8GB.
    """

    inputs: tuple[str, ...] = ()
    log_domain: str | None = None
    memory: str = "8GB"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError(
                "--refresh-counts is empty: name the newer logs, or a dataset that has them"
            )
        self.check_domain("log_domain", self.log_domain)
        memory_bytes(self.memory)
