"""Settings: when a checkpoint is written, and how many stay."""

from dataclasses import dataclass

from trainer.config.setting import setting


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written.

    Besides, one is written at the end, at a preemption, and when validation finds a better model.
    """

    every_steps: int = setting(
        0, "steps between two checkpoints; 0: not by steps"
    )
    every_minutes: float = setting(10.0, "minutes between two; 0: not by time")
    every_epochs: int = setting(1, "epochs between two; 0: not by epochs")
    keep: int = setting(
        2, "newest checkpoints that stay; the best one stays besides"
    )

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "every_epochs"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"checkpoint.{name} is {value}: give 0 (never) or more"
                )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}: give at least 1")
