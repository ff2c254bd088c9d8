"""Publishes a model where it is not worse than the one that serves, and only whole.

The folder of published versions is drawn in trainer/retraining/published.py.

Both models rank the newest held-out items of the candidate's dataset: those of users who came with
its newest logs, as the current model would have met them. A candidate is refused where a domain is
worse than the tolerance, and this is no chance (trainer/retraining/guards.py). It is also refused
where the day itself is unlike those before: where the figure falls far below the one with which the
current model was published, or where a held-out item gains far less than then by its own user
(trainer/evaluation/personalization.py).

Legend of shapes: U users of the dataset, B users that a domain is judged by.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from trainer.checkpoint.best_model import (
    TableSlot,
    TrainedModel,
    load_trained_model,
    open_run,
    read_config,
)
from trainer.checkpoint.load import find_best
from trainer.config.retraining import PublishConfig
from trainer.config.serving import ExportConfig
from trainer.data.format.dataset import Dataset, Domain
from trainer.data.split import LeaveOneOut
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.consensus import (
    require_same_on_all_ranks,
    run_on_all_ranks,
)
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.evaluation.bootstrap import GroupMeans
from trainer.evaluation.evaluation import MODEL as BY_MODEL
from trainer.evaluation.personalization import (
    UserSample,
    measure_personalization,
)
from trainer.evaluation.sampled import Candidates, Positions, evaluate_split
from trainer.files.atomic import Patience, retry_patiently
from trainer.retraining.day import read_arrivals
from trainer.retraining.guards import compare_positions, judge
from trainer.retraining.published import read_current_version
from trainer.retraining.registry import (
    Record,
    Registry,
)
from trainer.run_files import EXTENSION, HEADLINE, MODEL
from trainer.serving.export import export_run

_AT_ONCE = 8192  # users, of whom each replicate has a weight


def publish(
    candidate: str | Path,
    published: str | Path,
    ranks: Ranks,
    config: PublishConfig,
    data: str | Path | None = None,
    arrivals: str | Path | None = None,
) -> Record:
    """Compares a finished run's model with the current one, and publishes or refuses it.

    Called on all ranks. data: the candidate's dataset where it has moved. arrivals: the file with the
    day's prequential evaluation, which the record keeps. Returns the record: its `published` is the
    version's number or None, and its `reasons` say why not. A run that serves already is left alone.

    Raises InputError where the candidate cannot be used, another process publishes here, or
    nothing can be written; `current.json` is then as it was.
    """
    registry = Registry(Path(published))
    with registry.hold_lock(ranks):
        current = run_on_first_rank(
            lambda: read_current_version(registry.folder), ranks.first
        )
        run_config, dataset = open_run(
            candidate, data, of_all_domains=True, ranks=ranks
        )
        if run_config.split.kind != LeaveOneOut.name:
            raise InputError(
                f"{candidate}: has not learnt from its newest days (split.kind="
                f"{run_config.split.kind}): publish a run of split.kind=leave_one_out"
            )
        of_day = _read_arrivals(arrivals, ranks)
        identity = _identify(candidate, dataset, ranks)
        if current is not None and _is_same_run(current, identity):
            nothing: dict[str, list[str]] = {"reasons": [], "notes": []}
            return current | {"published": current["number"]} | nothing
        # One table for both models, and for what is exported.
        slot = TableSlot()
        current_test = None
        if current is not None:
            current_test = _rank_by_run(current["run"], dataset, ranks, slot)
        served = load_trained_model(candidate, run_config, dataset, ranks, slot)
        comparison = _Comparison(served, current, current_test, config)
        record = identity | comparison.measure()
        min_users = run_config.evaluation.min_users
        record |= _judge(record, of_day, config, min_users)
        if record["reasons"]:
            return run_on_first_rank(
                lambda: registry.refuse(record), ranks.first
            )
        version = _Version(registry, record, config)
        return version.publish(candidate, served, data)


def _read_arrivals(file: str | Path | None, ranks: Ranks) -> Record | None:
    """The day's prequential evaluation; None without one. Called on all ranks."""
    if file is None:
        return None
    return run_on_first_rank(lambda: read_arrivals(Path(file)), ranks.first)


def _judge(
    record: Record,
    arrivals: Record | None,
    config: PublishConfig,
    min_users: int,
) -> Record:
    """What a candidate's record says besides its figures. arrivals: of the day."""
    against_recency = None
    added: Record = {"min_users": min_users}
    if arrivals is not None:
        against_recency = arrivals.get("against_recency")
        added["arrivals"] = arrivals
    judgement = judge(record["domains"], config, min_users, against_recency)
    return asdict(judgement) | added


@dataclass(frozen=True)
class _Version:
    """The next version of a registry, and its record."""

    registry: Registry
    record: Record
    config: PublishConfig

    def publish(
        self,
        candidate: str | Path,
        served: TrainedModel,
        data: str | Path | None,
    ) -> Record:
        """Exports the candidate, and makes it the version that serves. Called on all ranks."""
        ranks = served.ranks
        number = run_on_first_rank(self.registry.begin_version, ranks.first)
        export_run(
            candidate,
            self.registry.partial_folder(number) / MODEL,
            ranks,
            ExportConfig(self.config.dtype),
            data,
            served,
        )
        record = self.record | {"number": number}
        return run_on_first_rank(
            lambda: self.registry.finish_version(record, self.config),
            ranks.first,
        )


def _identify(
    candidate: str | Path,
    dataset: Dataset,
    ranks: Ranks,
) -> Record:
    """What tells one candidate from another."""
    _, best, _ = find_best(Path(candidate), ranks)
    return {
        "run": str(Path(candidate).resolve()),
        "best": best,
        "dataset": dataset.fingerprint,
    }


def _is_same_run(
    current: Record,
    identity: Record,
) -> bool:
    """Whether the candidate is the run that serves, on the same dataset."""
    return all(current.get(name) == value for name, value in identity.items())


class HeldOutPositions(NamedTuple):
    """Where a model ranks each user's test item: int32 (U,), from 1; and the item's domain.

    The position is 0 for a user without a test item. Four users, of whom the second has none:

        position_U  [3, 0, 1, 12]
        domain_U    [0, 0, 1,  1]
    """

    position_U: np.ndarray
    domain_U: np.ndarray


@dataclass(frozen=True)
class _Comparison:
    """A candidate beside the current model on the candidate's dataset.

    current: the version that serves, and current_test: what its model ranks; None before the
    first version.
    """

    candidate: TrainedModel
    current: Record | None
    current_test: HeldOutPositions | None
    config: PublishConfig

    def measure(self) -> Record:
        """Figures by domain, on the users by whom a domain is judged. Called on all ranks."""
        dataset = self.candidate.dataset
        extended, newest_U = find_newest_users(dataset)
        wanted_U = newest_U if extended else np.ones(dataset.users, bool)
        drawn = UserSample(self.candidate.config, wanted_U)
        test = _rank_test_items(self.candidate, drawn)
        gains = measure_personalization(
            self.candidate.model,
            self.candidate.table,
            self.candidate.config,
            dataset,
            self.candidate.ranks,
            drawn,
            self.config.least_users,
        )
        domains = {}
        for number, domain in enumerate(dataset.domains):
            own_U = (test.position_U > 0) & (test.domain_U == number)
            figures = self._compare(
                domain,
                test,
                own_U,
                newest_U,
            )
            gain = gains[number]
            figures["own_item"] = None if gain is None else gain.value
            figures["own_item_error"] = None if gain is None else gain.error
            domains[domain.name] = figures | self._when_published(
                domain, figures
            )
        return {
            "domains": domains,
            "against": None if self.current is None else self.current["number"],
            "config": asdict(self.config),
        }

    def _compare(
        self,
        domain: Domain,
        test: HeldOutPositions,
        own_U: np.ndarray,
        newest_U: np.ndarray,
    ) -> Record:
        """A paired comparison of both models. own_U: users whose test item is the domain's."""
        newest_own_U = own_U & newest_U
        enough = int(np.count_nonzero(newest_own_U)) >= self.config.least_users
        (user_B,) = np.nonzero(newest_own_U if enough else own_U)
        position_B = test.position_U[user_B]
        current_B = None
        if self.current_test is not None:
            current_B = self.current_test.position_U[user_B]
        figures = compare_positions(position_B, current_B)
        figures["newest"] = enough
        if current_B is not None:
            means = GroupMeans(2, 1, self.candidate.config.seed)
            for first in range(0, len(user_B), _AT_ONCE):
                part = slice(first, first + _AT_ONCE)
                users = user_B[part]
                means.add(
                    users,
                    np.zeros((len(users), 1), np.int64),
                    [position_B[part], current_B[part]],
                )
            interval = means.difference(0, HEADLINE)["interval"]
            figures["difference"]["interval"] = interval
        return figures

    def _when_published(self, domain: Domain, figures: Record) -> Record:
        """The figures with which the current version was published; None where it had none.

        A version of before has no standard errors: they are taken from today's, for its users.
        """
        then: Record = {}
        if self.current is not None:
            then = self.current["domains"].get(domain.name, {})
        values = {}
        for name, key in (
            ("candidate", "when_published"),
            ("own_item", "own_item_then"),
        ):
            error = then.get(f"{name}_error")
            if error is None and then.get(name) is not None:
                error = _error_of(
                    figures[f"{name}_error"],
                    figures["users"],
                    then.get("users"),
                )
            values[key] = then.get(name)
            values[f"{key}_error"] = error
        return values


def _error_of(
    error: float | None, users: int, others: int | None
) -> float | None:
    """The standard error over so many other users, where users differ as much."""
    if error is None:
        return None
    return error * math.sqrt(users / max(1, others or users))


def find_newest_users(dataset: Dataset) -> tuple[bool, np.ndarray]:
    """Whether the dataset extends another one, and which users came with its newest logs, (U,).

    Called on all ranks; the same on all of them.
    """
    extended = run_on_all_ranks((dataset.folder / EXTENSION).is_dir)
    require_same_on_all_ranks(
        {"a dataset with other newest logs": {"extended": extended}}
    )
    newest_U = np.zeros(dataset.users, bool)
    if extended:
        file = dataset.folder / EXTENSION / "users.npy"
        patience = Patience(file.parent)
        users = run_on_all_ranks(
            lambda: retry_patiently(
                lambda: np.load(file, allow_pickle=False), patience
            )
        )
        digest = hashlib.sha256(users.tobytes()).hexdigest()
        require_same_on_all_ranks(
            {"a dataset with other newest logs": {"users": digest[:16]}}
        )
        newest_U[users] = True
    return extended, newest_U


def _rank_by_run(
    run: str,
    dataset: Dataset,
    ranks: Ranks,
    slot: TableSlot,
) -> HeldOutPositions:
    """What the model of another run ranks; nothing of it is left in memory but its table."""
    served = load_trained_model(
        run,
        read_config(run),
        dataset,
        ranks,
        slot,
    )
    return _rank_test_items(served)


def _rank_test_items(
    served: TrainedModel,
    drawn: UserSample | None = None,
) -> HeldOutPositions:
    """Ranks each user's test item among the drawn negatives. Called on all ranks.

    drawn: sees every user that is ranked.
    """
    dataset = served.dataset
    table_2U = torch.zeros(
        2,
        dataset.users,
        dtype=torch.int32,
    )

    def visit(
        candidates: Candidates,
        positions: Positions,
        scores_C: np.ndarray,
    ) -> None:
        real = candidates.user_B >= 0
        users = torch.from_numpy(candidates.user_B[real])
        of_model = torch.from_numpy(positions[BY_MODEL][real])
        domains = torch.from_numpy(candidates.domain_B[real])
        table_2U[0, users] = of_model.int()
        table_2U[1, users] = domains.int()
        if drawn is not None:
            drawn.visit(
                candidates,
                positions,
                scores_C,
            )

    evaluate_split(
        served.model,
        served.table,
        dataset,
        served.ranks,
        served.config,
        "test",
        visit=visit,
    )
    dist.all_reduce(table_2U)
    position_U, domain_U = table_2U.numpy()
    return HeldOutPositions(position_U, domain_U)
