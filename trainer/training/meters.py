"""What happened since the last log line: mean losses, φ, λ, speed, and time spent waiting for data."""

import contextlib
import resource
import time

import torch
import torch.distributed as dist


class IntervalMeter:
    """Collects on the device, without waiting for it, and reduces over ranks only when a line is due."""

    def __init__(self, domains):
        self.domains = domains
        self.started = time.perf_counter()
        self._reset()

    def _reset(self):
        self._reports, self._users, self._tokens, self._skipped = [], 0, 0, 0
        self._waited, self._begun = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        """Time in here is time spent waiting for data."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self):
        """Time in here (validation, saving) does not count as training."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun

    def add(self, batch, loss, report, skipped=0):
        """One step of this rank. batch: on the host; skipped: users that are not in it as they could not be read."""
        domains = len(self.domains)
        self._reports.append(
            torch.cat(
                [
                    torch.stack([loss, report.mutual_information]).double(),
                    torch.stack([report.loss_single, report.loss_cross]),
                    *(
                        values.double()
                        for values in (
                            report.single_D,
                            report.cross_D,
                            report.phi_D,
                            report.lambda_D,
                        )
                    ),
                ]
            )
        )
        assert len(self._reports[-1]) == 4 + 4 * domains
        real = int(batch.weight_B.sum())
        self._users += real
        self._tokens += batch.interactions - 2 * (len(batch.weight_B) - real)
        self._skipped += skipped

    def record(self, step, epoch):
        """The figures of a train record (see trainer.reporting.run_log), means over the interval; λ is the newest. On all ranks."""
        elapsed = time.perf_counter() - self._begun
        steps = torch.stack(self._reports)
        # Each rank's loss has the global one as its mean over ranks, and its mutual information is a share of the sum.
        counts = steps.new_tensor([self._users, self._tokens, self._skipped])
        shared = torch.stack([steps[:, 0].mean(), steps[:, 1].mean(), *counts])
        dist.all_reduce(shared)
        loss, information, users, tokens, skipped = shared.tolist()
        loss_single, loss_cross = steps[:, 2:4].mean(0).tolist()
        single, cross, phi = (
            steps[:, 4 : 4 + 3 * len(self.domains)].nanmean(0).view(3, -1).tolist()
        )
        lambdas = steps[-1, -len(self.domains) :].tolist()
        figures = {
            "step": step,
            "epoch": epoch,
            "seconds": time.perf_counter() - self.started,
            "loss": loss / dist.get_world_size(),
            "loss_single": loss_single,
            "loss_cross": loss_cross,
            "mutual_information": information,
            "single_by_domain": self._named(single),
            "cross_by_domain": self._named(cross),
            "lambda": self._named(lambdas),
            "phi": self._named(phi),
            "users_per_second": users / elapsed,
            "tokens_per_second": tokens / elapsed,
            "skipped_users": int(skipped),
            "data_wait": self._waited / elapsed,
            "memory_gb": _memory_gb(),
        }
        self._reset()
        return figures

    def _named(self, values):
        return dict(zip(self.domains, values, strict=True))


def _memory_gb():
    """Peak memory of this process, on the device where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
