"""Settings: what is ranked, how often, and when training stops early (early stopping)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """What is ranked, and how often."""

    negatives: int = 99  # candidates beside the held-out item
    batch_size: int = 512  # users that each rank has at once
    every_epochs: int = 1  # validation, and with it the choice of the best model
    patience: int = (
        5  # validations without a better mean NDCG@10 before training stops; 0: never
    )

    def __post_init__(self):
        for name in ("negatives", "batch_size", "every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluation.{name} is {getattr(self, name)}: give at least 1"
                )
        if self.patience < 0:
            raise ValueError(
                f"evaluation.patience is {self.patience}: give 0 (never stop early) or more"
            )
