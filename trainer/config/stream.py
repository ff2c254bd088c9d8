"""Settings: how shards are fetched, and how they become batches."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SourceConfig:
    """How a dataset that lies elsewhere is fetched; a local folder needs none of it."""

    cache: str = ""  # the folder that gets the files; empty: syncrec-trainer in the user's cache folder
    cache_bytes: int = (
        2**35
    )  # of each dataset in it: the shards read longest ago make room
    attempts: int = 5  # before a file counts as one that cannot be read
    retry_seconds: float = (
        0.5  # wait after the first failure, twice as long after each further one
    )
    timeout_seconds: float = 60.0  # an attempt without a byte for so long has failed
    read_ahead: int = 2  # shards fetched before a reader asks for them; 0: none

    def __post_init__(self):
        for name in ("cache_bytes", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"stream.{name} is {getattr(self, name)}: give at least 1"
                )
        for name, least in (
            ("retry_seconds", "0 or more"),
            ("timeout_seconds", "more than 0"),
        ):
            value = getattr(self, name)
            if not (0 <= value < 1e6 and (value or name == "retry_seconds")):
                raise ValueError(f"stream.{name} is {value}: give {least}")
        if self.read_ahead < 0:
            raise ValueError(f"stream.read_ahead is {self.read_ahead}: give 0 or more")


MEASURED = -1


@dataclass(frozen=True)
class StreamConfig(SourceConfig):
    """How shards become batches, and how they are fetched where they lie elsewhere."""

    workers: int = -1  # processes a rank that build batches; −1: as many as it takes; 0: in the training process itself
    prefetch: int = 4  # batches that each worker keeps ready
    verify: bool = True  # check each block's checksum when it is read, and a shard's when its home rank opens it
    damaged: Literal["stop", "skip"] = (
        "stop"  # skip: train without the users of damaged blocks, and count them
    )
    shuffle: bool = (
        True  # another order each epoch; off: the dataset's own order, each epoch alike
    )
    balance: bool = True  # move users between ranks, so that all have equally much to do; off: as the shards lie
    domain: str = ""  # train and rank on this domain's interactions alone, of users who are split as for all domains

    def __post_init__(self):
        super().__post_init__()
        if self.workers < MEASURED:
            raise ValueError(
                f"stream.workers is {self.workers}: give 0 or more, or {MEASURED} to have it measured"
            )
        if self.prefetch < 1:
            raise ValueError(f"stream.prefetch is {self.prefetch}: give at least 1")
