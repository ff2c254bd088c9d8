"""Settings: what is ranked, how often, and when training stops early (early stopping)."""

from dataclasses import dataclass

from trainer.config.setting import setting


@dataclass(frozen=True)
class EvaluationConfig:
    """How held-out items are ranked (leave-one-out), and how often."""

    negatives: int = setting(99, "drawn candidates beside the held-out item")
    batch_size: int = setting(
        512, "users that each rank has at once", on_resume=True
    )
    every_epochs: int = setting(
        1,
        "epochs between validations, which choose the best model",
        on_resume=True,
    )
    min_users: int = setting(
        50,
        "evaluated users of a domain that counts: in the mean, for the best step, in guards",
        on_resume=True,
    )
    recency_term: bool = setting(
        False,
        "rank test items by the model with its recency term, too (docs/evaluate.md)",
        on_resume=True,
    )
    patience: int = setting(
        5,
        "early stopping: validations without a better mean NDCG@10; 0: never",
        on_resume=True,
    )

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_size", "every_epochs", "min_users"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"evaluation.{name} is {value}: give at least 1"
                )
        if self.patience < 0:
            raise ValueError(
                f"evaluation.patience is {self.patience}: give 0 (never stop early) or more"
            )
