"""Settings: how large a synthetic log is, and which truth lies behind it."""

from dataclasses import dataclass

import numpy as np

from trainer.errors import InputError

_RELATED_NAMES = (
    "shop",
    "video",
    "navi",
    "coupon",
    "music",
    "books",
    "games",
    "travel",
    "news",
)
_UNRELATED_NAME = "ads"
_LOWER_BOUNDS = {
    "users": 1,
    "domains": 1,
    "mean_length": 1,
    "seed": 0,
    "topics": 2,
    "exponent": 0,
}
_PROBABILITIES = ("interest_drift", "unrelated_drift", "unrelated_share", "on_topic")


@dataclass(frozen=True)
class SyntheticConfig:
    """How much is made, and how the truth behaves.

    items: of all domains together, which share them evenly.
    mean_length: mean interactions of a user. Lengths are geometric, so some users are too short
    to be evaluated.
    unrelated_share: the unrelated domain's share of the events.
    exponent: of the popularity's power law.
    hours: mean time between two events of a user.
    """

    users: int = 2000
    items: int = 2000
    domains: int = 4
    mean_length: float = 40.0
    seed: int = 0
    topics: int = 32
    interest_drift: float = 0.1
    unrelated_drift: float = 0.01
    unrelated_share: float = 0.45
    on_topic: float = 0.9
    exponent: float = 1.0
    hours: float = 6.0

    def __post_init__(self) -> None:
        for name, bound in _LOWER_BOUNDS.items():
            value = getattr(self, name)
            if not value >= bound:
                raise InputError(f"{name} is {value}: it must be at least {bound}")
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(
                    f"{name} is {value}: it must be at least 0 and below 1"
                )
        least_items = self.domains * self.topics
        if self.items < least_items:
            raise InputError(
                f"items is {self.items}: "
                f"every domain needs one a topic, {least_items} together"
            )
        if not self.hours > 0:
            raise InputError(f"hours is {self.hours}: it must be above 0")

    @property
    def related(self) -> int:
        """The number of related domains, which are the first ones."""
        if self.domains > 2 and self.unrelated_share > 0:
            return self.domains - 1
        return self.domains

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, (D,), the unrelated one last."""
        names = list(_RELATED_NAMES[: self.related])
        for number in range(len(names), self.related):
            names.append(f"domain{number}")
        if self.related < self.domains:
            names.append(_UNRELATED_NAME)
        return tuple(names)

    @property
    def shares(self) -> np.ndarray:
        """Shares of the events by domain, float64 (D,).

        Those of the related domains fall as 1 / sqrt(number of the domain, from 1).
        """
        related = 1 / np.sqrt(1 + np.arange(self.related))
        unrelated_domains = self.domains - self.related
        unrelated_share = 0.0
        if unrelated_domains:
            unrelated_share = self.unrelated_share
        related = related / related.sum() * (1 - unrelated_share)
        return np.append(related, [unrelated_share] * unrelated_domains)

    @property
    def domain_items(self) -> np.ndarray:
        """Items by domain, int64 (D,)."""
        bounds = np.arange(self.domains + 1) * self.items // self.domains
        return np.diff(bounds)
