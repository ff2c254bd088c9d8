"""Settings: the items that a target is trained against (negative sampling)."""

from dataclasses import dataclass

from trainer.config.setting import setting


@dataclass(frozen=True)
class NegativesConfig:
    """Negatives, drawn uniformly from the items of the target's domain without the target."""

    per_target: int = setting(
        1, "negatives drawn anew for each target, where shared is 0"
    )
    shared: int = setting(
        1024,
        "negatives of a domain and step, shared by all its targets; 0: per_target",
    )

    def __post_init__(self) -> None:
        if self.per_target < 1:
            raise ValueError(
                f"negatives.per_target is {self.per_target}: give at least 1"
            )
        if self.shared < 0:
            raise ValueError(
                f"negatives.shared is {self.shared}: give 0 (off) or more"
            )
