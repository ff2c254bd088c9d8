"""Metrics since the last log line: mean losses, φ, λ, throughput, time spent waiting for data."""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.evaluation.domain_weights import relative_weights

if TYPE_CHECKING:
    from syncrec.batch.views import Batch
    from syncrec.model import LossReport
    from trainer.training.observers.utilization import WorkMeter


class IntervalMeter:
    """Collects a log line's figures on the device, without waiting for it.

    They are reduced over ranks only when a line is due.
    """

    def __init__(
        self,
        domains: list[str],
        mutual_information: bool = True,
        work: "WorkMeter | None" = None,
        exchange_seconds: Callable[[], float] | None = None,
    ):
        """mutual_information: the model has that loss; else records have none.

        work: counts what steps compute. exchange_seconds: so far in exchanges between ranks. Without
        them records do not have those figures.
        """
        self.domains = domains
        self.mutual_information = mutual_information
        self._work = work
        self._exchange_seconds = exchange_seconds
        self.started = time.perf_counter()
        self._pauses = 0  # that are open, one within the other
        self._reset()

    def _reset(self) -> None:
        self._reports: list[torch.Tensor] = []
        self._users = 0
        self._tokens = 0
        self._skipped = 0
        self._waited = 0.0
        self._exchanged_before = self._exchanged()
        self._begun = time.perf_counter()

    def _exchanged(self) -> float:
        """The seconds of all exchanges so far."""
        if self._exchange_seconds is None:
            return math.nan
        return self._exchange_seconds()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time spent waiting for data."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (validation, saving) does not count as training. It may be nested."""
        begun = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                seconds = time.perf_counter() - begun
                self._begun += seconds

    def add(
        self,
        batch: "Batch",
        loss: torch.Tensor,
        report: "LossReport",
        skipped: int = 0,
    ) -> None:
        """Adds one step of this rank.

        batch: on the host. skipped: users that are not in it as they could not be read.
        """
        totals = torch.stack([loss, report.mutual_information]).double()
        views = torch.stack([report.loss_single, report.loss_cross])
        figures = torch.cat(
            [
                totals,
                views,
                report.single_D.double(),
                report.cross_D.double(),
                report.phi_D.double(),
                report.lambda_D.double(),
            ]
        )
        if self._work is not None:
            self._work.add(batch)
        assert len(figures) == 4 + 4 * len(self.domains)
        self._reports.append(figures)
        users = int(batch.weight_B.sum())
        # Who only fills up has two interactions.
        fillers = len(batch.weight_B) - users
        self._users += users
        self._tokens += batch.interactions - 2 * fillers
        self._skipped += skipped

    def record(self, step: int, epoch: int) -> dict[str, Any]:
        """Makes the figures of a train record (see trainer.reporting.run_log). On all ranks.

        They are means over the interval; λ is the newest, 1 where all domains weigh alike.
        """
        elapsed = time.perf_counter() - self._begun
        domains = len(self.domains)
        world_size = dist.get_world_size()
        steps = torch.stack(self._reports)
        # Each rank's loss has the global one as its mean over ranks, and its mutual information is
        # a share of the sum.
        mean_loss = steps[:, 0].mean()
        mean_information = steps[:, 1].mean()
        exchanged = self._exchanged() - self._exchanged_before
        work = [0.0, 0, 0, 0]
        if self._work is not None:
            work = [self._work.peak, *self._work.take()]
        counts = steps.new_tensor(
            [
                self._users,
                self._tokens,
                self._skipped,
                exchanged,
                *work,
            ]
        )
        shared = torch.stack([mean_loss, mean_information, *counts])
        dist.all_reduce(shared)
        loss, information, users, tokens, skipped, *use = shared.tolist()
        views = steps[:, 2:4].mean(0)
        loss_single, loss_cross = views.tolist()
        # A domain's mean is over the steps that have it.
        by_domain = steps[:, 4 : 4 + 3 * domains].nanmean(0)
        single, cross, phi = by_domain.view(3, domains).tolist()
        newest = steps[-1]
        lambdas = newest[-domains:].tolist()
        figures = {
            "step": step,
            "epoch": epoch,
            "seconds": time.perf_counter() - self.started,
            "loss": loss / world_size,
            "loss_single": loss_single,
            "loss_cross": loss_cross,
            "mutual_information": information
            if self.mutual_information
            else None,
            "single_by_domain": self._name_domains(single),
            "cross_by_domain": self._name_domains(cross),
            "lambda": relative_weights(self._name_domains(lambdas)),
            "phi": self._name_domains(phi),
            "users_per_second": users / elapsed,
            "tokens_per_second": tokens / elapsed,
            "skipped_users": int(skipped),
            "data_wait": self._waited / elapsed,
            **_describe_use(use, elapsed, world_size),
            "memory_gb": _peak_memory_gb(),
        }
        self._reset()
        return figures

    def _name_domains(self, values_D: list[float]) -> dict[str, float]:
        """Returns the values by the domains' names."""
        return dict(zip(self.domains, values_D, strict=True))


def _describe_use(
    sums: list[float], elapsed: float, world_size: int
) -> dict[str, float | None]:
    """What of the time are exchanges, of the slots padding, of the devices' arithmetic the model.

    sums: over ranks: exchange seconds, peak, tokens, slots, operations.
    """
    exchanged, peak, tokens, slots, operations = sums
    return {
        "exchange": exchanged / elapsed / world_size,
        "padding": 1 - tokens / slots if slots else None,
        "mfu": operations / elapsed / peak if peak else None,
    }


def _peak_memory_gb() -> float:
    """Returns this process's peak memory, on the device where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss / 2**20
