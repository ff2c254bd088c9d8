"""An evaluation: figures of a model and of baselines by domain, and the record that a run writes.

The record is a JSON object. `metrics.jsonl` has one a line, `evaluation-full-SPLIT.json` holds one
of a ranking among all items:

    kind               "validation" or "test"
    ranking            "full" among all items; absent among drawn candidates
    too_short          users whose history is too short to be split (leave-one-out)
    split              of a split by time: kind, whose, the first moments of validation and test, and
                       `without_history`, events left out as their user has none before them
    unseen             of a split by time: the figures of the targets whose item training has not
                       seen, by system, which count in no others (trainer/evaluation/targets.py)
    skipped_users      users left out because they could not be read
    step, epoch        of the model; seconds since the run began, where a run logs the record
    domains            {name: {users, HR@5, …, MRR}}, by the model
    mean               {HR@5, …, MRR}, over the domains that count
    mean_domains       the names of the domains that count (absent: those with users)
    min_users          users that a domain has which counts; of fewer each has where none has so
                       many
    user_mean          {HR@5, …, MRR}, over all users (absent: follows from domains)
    popularity         as domains, by popularity (optional)
    popularity_mean, popularity_user_mean    as mean and user_mean, by popularity (optional)
    recency, recency_mean, recency_user_mean    likewise, by recency popularity (optional)
    recency_choice     its half-life, and how it was chosen (trainer/evaluation/recency)
    with_recency, with_recency_mean, with_recency_user_mean    likewise, by the model with its
                       recency term (optional)
    recency_term       the term's weights by domain
    recency_difference    as difference, to recency popularity
    difference, breakdown, recommended, sampled    of a ranking among all items alone

This module needs neither torch nor a dataset: reports import it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from trainer.evaluation.metrics import (
    Figures,
    domains_of_mean,
    user_mean_figures,
)
from trainer.run_files import HEADLINE

if TYPE_CHECKING:
    import pandas
    import pyarrow


_BEFORE = ("kind", "ranking", "too_short", "skipped_users", "split", "unseen")
_MEANS = ("mean_domains", "min_users", "user_mean")
MODEL = "model"
POPULARITY = "popularity"
RECENCY = "recency"
WITH_RECENCY = "with_recency"
# What may stand beside the model, by its key in a record.
COMPARED = (POPULARITY, RECENCY, WITH_RECENCY)
_ABOUT_RECENCY = ("recency_choice", "recency_term")
_FULL = (
    "difference",
    "recency_difference",
    "breakdown",
    "recommended",
    "sampled",
)


def _keys_of(system: str) -> tuple[str, str, str]:
    """The keys of a compared system's figures: by domain, their mean, the mean over users."""
    return system, f"{system}_mean", f"{system}_user_mean"


_FIGURES = (
    "domains",
    "mean",
    *_MEANS,
    *_keys_of(POPULARITY),
    *_keys_of(RECENCY),
    *_keys_of(WITH_RECENCY),
    *_ABOUT_RECENCY,
)


@dataclass(frozen=True)
class ComparedMeans:
    """The means of a system that stands beside the model; None what a record does not say."""

    mean: Figures | None = None
    user_mean: Figures | None = None


@dataclass(frozen=True)
class DomainFigures:
    """One domain's figures.

    model, popularity, recency, with_recency: {"users": 204, "HR@5": 0.88, …}, by the model, by
    popularity, by recency popularity, and by the model with its recency term; empty where the
    record has none. A metric is None in a domain without users.
    """

    name: str
    model: Figures
    popularity: Figures
    recency: Figures = field(default_factory=dict)
    with_recency: Figures = field(default_factory=dict)

    def compared(self, system: str) -> Figures:
        """The figures of one of COMPARED."""
        figures: Figures = getattr(self, system)
        return figures

    @property
    def users(self) -> int:
        """Users whose held-out item is of this domain."""
        return cast(int, self.model.get("users") or 0)

    @property
    def headline(self) -> float | None:
        """The model's NDCG@10."""
        return self.model.get(HEADLINE)

    @property
    def popularity_headline(self) -> float | None:
        """Popularity's NDCG@10."""
        return self.popularity.get(HEADLINE)

    @property
    def recency_headline(self) -> float | None:
        """Recency popularity's NDCG@10."""
        return self.recency.get(HEADLINE)

    @property
    def with_recency_headline(self) -> float | None:
        """The NDCG@10 of the model with its recency term."""
        return self.with_recency.get(HEADLINE)


class DomainTable(list[DomainFigures]):
    """The domains' figures, a row for each domain, in the dataset's order.

    metrics: the names of the metrics, in the record's order. A notebook shows it as a table.
    """

    def __init__(
        self, rows: Iterable[DomainFigures], metrics: Iterable[str]
    ) -> None:
        super().__init__(rows)
        self.metrics = list(metrics)

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each domain and system: `domain`, `system`, `users`, and the metrics.

            domain        system    users    HR@5    HR@10    …
             Books         model      204    0.88     1.00
             Books    popularity      204    0.61     0.93
              Toys         model       79    0.79     1.00
              Toys    popularity       79    0.85     0.97

        Raises ImportError with the way out without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "pandas is not installed: `pip install pandas`, or use Evaluation.by_domain"
            ) from error
        columns = ["domain", "system", "users", *self.metrics]
        return pandas.DataFrame(self._rows(), columns=columns)

    def to_arrow(self) -> "pyarrow.Table":
        """The same rows as a pyarrow Table."""
        import pyarrow

        return pyarrow.Table.from_pylist(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self:
            for system in (MODEL, *COMPARED):
                figures = row.model
                if system != MODEL:
                    figures = row.compared(system)
                if not figures:
                    continue
                values: dict[str, Any] = {"domain": row.name, "system": system}
                values["users"] = figures["users"]
                for name in self.metrics:
                    values[name] = figures.get(name)
                rows.append(values)
        return rows


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model on one split.

    by_domain: a row for each domain, in the dataset's order. mean: over the domains that count,
    whose names are `mean_domains`. user_mean: over all users. split, unseen: of a split by time, as the
    record has them; None of leave-one-out. There a user may have several targets, and each counts as
    one of `users`. compared: the means of systems beside
    the model, by one of COMPARED. min_users: what a domain needs to count
    (`evaluation.min_users`). model_state: `step`, `epoch` and what else says which model it was, in
    the record's order. full: `difference`, `breakdown`, `recommended` and `sampled` of a ranking
    among all items, empty otherwise. recency_choice, recency_term: see trainer/evaluation/recency.
    """

    kind: str
    by_domain: DomainTable
    mean: Figures
    compared: dict[str, ComparedMeans] = field(default_factory=dict)
    too_short: int | None = None
    skipped_users: int | None = None
    split: dict[str, Any] | None = None
    unseen: dict[str, Any] | None = None
    model_state: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    recorded_domains: tuple[str, ...] | None = None
    min_users: int | None = None
    recorded_user_mean: Figures | None = None
    recency_choice: dict[str, Any] | None = None
    recency_term: dict[str, Any] | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Evaluation":
        """Reads a record. Raises KeyError where it has no kind, domains or mean."""
        rows = []
        for name, figures in record["domains"].items():
            beside = {}
            for system in COMPARED:
                of_system = record.get(system) or {}
                beside[system] = of_system.get(name) or {}
            rows.append(DomainFigures(name, figures, **beside))
        compared = {}
        for system in COMPARED:
            _, mean, user_mean = _keys_of(system)
            means = ComparedMeans(record.get(mean), record.get(user_mean))
            if means != ComparedMeans():
                compared[system] = means
        model_state = {}
        for key, value in record.items():
            if key not in (*_BEFORE, *_FIGURES, *_FULL):
                model_state[key] = value
        full = {key: record[key] for key in _FULL if key in record}
        domains = record.get("mean_domains")
        return cls(
            kind=record["kind"],
            by_domain=DomainTable(rows, _metrics_of(record["mean"])),
            mean=record["mean"],
            compared=compared,
            too_short=record.get("too_short"),
            skipped_users=record.get("skipped_users"),
            split=record.get("split"),
            unseen=record.get("unseen"),
            model_state=model_state,
            full=full,
            recorded_domains=None if domains is None else tuple(domains),
            min_users=record.get("min_users"),
            recorded_user_mean=record.get("user_mean"),
            recency_choice=record.get("recency_choice"),
            recency_term=record.get("recency_term"),
        )

    def to_record(self) -> dict[str, Any]:
        """The record, without the keys for which there is nothing."""
        record: dict[str, Any] = {"kind": self.kind}
        if self.full:
            record["ranking"] = "full"
        if self.too_short is not None:
            record["too_short"] = self.too_short
        if self.skipped_users is not None:
            record["skipped_users"] = self.skipped_users
        if self.split is not None:
            record["split"] = self.split
        if self.unseen is not None:
            record["unseen"] = self.unseen
        record |= self.model_state
        record["domains"] = {row.name: row.model for row in self.by_domain}
        record["mean"] = self.mean
        if self.recorded_domains is not None:
            record["mean_domains"] = list(self.recorded_domains)
        if self.min_users is not None:
            record["min_users"] = self.min_users
        if self.recorded_user_mean is not None:
            record["user_mean"] = self.recorded_user_mean
        for system in COMPARED:
            self._record_compared(system, record)
        for key in _ABOUT_RECENCY:
            about = getattr(self, key)
            if about is not None:
                record[key] = about
        return record | self.full

    def _record_compared(self, system: str, record: dict[str, Any]) -> None:
        """Adds the figures of a system beside the model."""
        by_domain, mean, user_mean = _keys_of(system)
        if self.has_compared(system):
            record[by_domain] = {}
            for row in self.by_domain:
                record[by_domain][row.name] = row.compared(system)
        means = self.compared.get(system, ComparedMeans())
        if means.mean is not None:
            record[mean] = means.mean
        if means.user_mean is not None:
            record[user_mean] = means.user_mean

    def to_pandas(self) -> "pandas.DataFrame":
        """`by_domain` as a DataFrame."""
        return self.by_domain.to_pandas()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the record's order."""
        return _metrics_of(self.mean)

    @property
    def step(self) -> int:
        """Training steps of the model. Raises KeyError where the record has none."""
        return self.model_state["step"]

    def has_compared(self, system: str) -> bool:
        """Whether the figures of one of COMPARED stand beside the model's."""
        return any(row.compared(system) for row in self.by_domain)

    @property
    def has_popularity(self) -> bool:
        """Whether popularity's figures stand beside the model's."""
        return self.has_compared(POPULARITY)

    @property
    def has_recency(self) -> bool:
        """Whether recency popularity's figures stand beside the model's."""
        return self.has_compared(RECENCY)

    @property
    def users(self) -> int:
        """Users that were evaluated, in all domains together."""
        return sum(row.users for row in self.by_domain)

    @property
    def users_by_domain(self) -> dict[str, int]:
        """Users that were evaluated, by domain."""
        return {row.name: row.users for row in self.by_domain}

    @property
    def unseen_by_domain(self) -> dict[str, int]:
        """Targets whose item training has not seen, by domain; empty of leave-one-out."""
        of_model = (self.unseen or {}).get(MODEL, {})
        return {name: figures["users"] for name, figures in of_model.items()}

    @property
    def mean_domains(self) -> list[str]:
        """The domains that count in `mean`; in a record of before, those with users."""
        if self.recorded_domains is not None:
            return list(self.recorded_domains)
        return domains_of_mean(self.users_by_domain, 1)

    @property
    def small_domains(self) -> dict[str, int]:
        """{name: users} of the domains that have users and do not count in `mean`."""
        small = {}
        for name, users in self.users_by_domain.items():
            if users and name not in self.mean_domains:
                small[name] = users
        return small

    @property
    def all_are_small(self) -> bool:
        """Whether no domain has `min_users` users, so that all count in `mean`."""
        most = max(self.users_by_domain.values(), default=0)
        return most > 0 and self.min_users is not None and most < self.min_users

    @property
    def user_mean(self) -> Figures:
        """Each metric's mean over all users, whatever their domain."""
        if self.recorded_user_mean is not None:
            return self.recorded_user_mean
        by_domain = {row.name: row.model for row in self.by_domain}
        return user_mean_figures(by_domain, self.metrics)

    def compared_mean(self, system: str) -> Figures | None:
        """The mean of one of COMPARED over the domains that count; None without its figures."""
        return self.compared.get(system, ComparedMeans()).mean

    def compared_user_mean(self, system: str) -> Figures | None:
        """The mean of one of COMPARED over all users; None without its figures."""
        recorded = self.compared.get(system, ComparedMeans()).user_mean
        if recorded is not None:
            return recorded
        if not self.has_compared(system):
            return None
        by_domain = {}
        for row in self.by_domain:
            figures = row.compared(system)
            if figures:
                by_domain[row.name] = {**figures, "users": row.users}
        return user_mean_figures(by_domain, self.metrics)

    @property
    def popularity_mean(self) -> Figures | None:
        """Popularity's `mean`."""
        return self.compared_mean(POPULARITY)

    @property
    def popularity_user_mean(self) -> Figures | None:
        """Popularity's `user_mean`."""
        return self.compared_user_mean(POPULARITY)

    def mean_rows(
        self, mean: str, over_users: str
    ) -> tuple[DomainFigures, DomainFigures]:
        """Both means as rows of a table: over the domains that count, and over all users.

        mean, over_users: the names of the rows.
        """
        means = {}
        user_means = {}
        for system in COMPARED:
            means[system] = self.compared_mean(system) or {}
            user_means[system] = self.compared_user_mean(system) or {}
        return (
            DomainFigures(mean, self.mean, **means),
            DomainFigures(over_users, self.user_mean, **user_means),
        )

    @property
    def mean_ndcg(self) -> float | None:
        """The mean NDCG@10 over the domains that count, which chooses the best model.

        None without users.
        """
        return self.mean.get(HEADLINE)

    @property
    def user_mean_ndcg(self) -> float | None:
        """The mean NDCG@10 over all users; None without users."""
        return self.user_mean.get(HEADLINE)

    @property
    def popularity_mean_ndcg(self) -> float | None:
        """Popularity's mean NDCG@10."""
        return (self.popularity_mean or {}).get(HEADLINE)

    @property
    def recency_mean_ndcg(self) -> float | None:
        """Recency popularity's mean NDCG@10."""
        return (self.compared_mean(RECENCY) or {}).get(HEADLINE)

    def figures_of(self, domain: str) -> DomainFigures:
        """A domain's figures, empty ones where the evaluation does not have the domain."""
        for row in self.by_domain:
            if row.name == domain:
                return row
        return DomainFigures(domain, {}, {})


def _metrics_of(mean: Figures) -> list[str]:
    """The names of the metrics in a mean."""
    return [name for name in mean if name not in ("users", "interval")]
