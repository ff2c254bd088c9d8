"""Settings: when a checkpoint is written, and how many stay."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written; besides at the end, when validation finds a better model, and when asked to stop."""

    every_steps: int = 0  # 0: not by steps
    every_minutes: float = 10.0  # 0: not by time
    every_epochs: int = 1  # 0: not by epochs
    keep: int = 2  # newest ones that stay; the best one stays besides

    def __post_init__(self):
        for name in ("every_steps", "every_minutes", "every_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"checkpoint.{name} is {getattr(self, name)}: give 0 (never) or more"
                )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}: give at least 1")
