"""Settings: how shards are fetched, and how they become batches."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.setting import setting

MEASURED = -1  # of stream.workers: as many as a measurement finds best


@dataclass(frozen=True)
class SourceConfig:
    """How a remote dataset is fetched into a cache; a local folder needs none of it."""

    cache: str = setting(
        "",
        "the folder that gets the files; empty: syncrec-trainer in the user's cache",
        on_resume=True,
        on_each_host=True,
    )
    cache_bytes: int = setting(
        2**35,
        "of each dataset in it: the shards read longest ago make room (LRU)",
        on_resume=True,
        on_each_host=True,
    )
    attempts: int = setting(
        5,
        "attempts before a file counts as one that cannot be read",
        on_resume=True,
        on_each_host=True,
    )
    retry_seconds: float = setting(
        0.5,
        "the wait after the first failure; it doubles after each further one",
        on_resume=True,
        on_each_host=True,
    )
    timeout_seconds: float = setting(
        60.0,
        "an attempt without a byte for so long has failed",
        on_resume=True,
        on_each_host=True,
    )
    read_ahead: int = setting(
        2,
        "shards fetched before a reader asks for them (prefetch); 0: none",
        on_resume=True,
        on_each_host=True,
    )

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "attempts"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"stream.{name} is {value}: give at least 1")
        if not 0 <= self.retry_seconds < 1e6:
            raise ValueError(
                f"stream.retry_seconds is {self.retry_seconds}: give 0 or more"
            )
        if not 0 < self.timeout_seconds < 1e6:
            raise ValueError(
                f"stream.timeout_seconds is {self.timeout_seconds}: give more than 0"
            )
        if self.read_ahead < 0:
            raise ValueError(
                f"stream.read_ahead is {self.read_ahead}: give 0 or more"
            )


@dataclass(frozen=True)
class StreamConfig(SourceConfig):
    """How shards become batches, and how a remote dataset is fetched."""

    workers: int = setting(
        MEASURED,
        "processes a rank that build batches; -1: measured; 0: the training process",
        on_resume=True,
    )
    prefetch: int = setting(
        4, "batches that each worker keeps ready", on_resume=True
    )
    verify: bool = setting(
        True,
        "check each block's checksum, and a shard's when its home rank opens it",
        on_resume=True,
    )
    damaged: Literal["stop", "skip"] = setting(
        "stop",
        "skip: train without the users of damaged blocks, and count them",
        on_resume=True,
    )
    shuffle: bool = setting(
        True, "another order each epoch; off: the dataset's own order"
    )
    balance: bool = setting(
        True, "move users between ranks, so that all have equally much to do"
    )
    domain: str = setting(
        "",
        "train and rank on this domain alone, with users split as for all domains",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < MEASURED:
            raise ValueError(
                f"stream.workers is {self.workers}: give 0 or more, or {MEASURED} to have "
                "it measured"
            )
        if self.prefetch < 1:
            raise ValueError(
                f"stream.prefetch is {self.prefetch}: give at least 1"
            )
