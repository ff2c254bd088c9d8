"""Settings: which items a target is trained against (negative sampling)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NegativesConfig:
    """Uniform over the items of the target's domain, never the target itself."""

    per_target: int = 1  # drawn anew for each target
    shared: int = 0  # if above 0: so many a domain and step instead, shared by all its targets; all items if it has fewer

    def __post_init__(self):
        if self.per_target < 1:
            raise ValueError(
                f"negatives.per_target is {self.per_target}: give at least 1"
            )
        if self.shared < 0:
            raise ValueError(f"negatives.shared is {self.shared}: give 0 (off) or more")
