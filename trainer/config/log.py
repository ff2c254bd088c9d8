"""Settings: what a run logs while it trains."""

from dataclasses import dataclass

from trainer.config.setting import setting


@dataclass(frozen=True)
class LogConfig:
    """What a run logs while it trains."""

    every: int = setting(50, "steps between two lines")
    tensorboard: bool = setting(True, "write TensorBoard's event files too")

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}: give at least 1")
