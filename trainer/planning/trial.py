"""The dense model on some users of a batch, in this process: its memory, operations and seconds.

No rank is started and no table is made. The users have the lengths of the dataset's; which items they
have is drawn, which changes neither memory nor operations. Where a whole batch is too much for some
seconds, a part of its users is taken twice, once as many and once half as many. What comes of more
users follows by a straight line.

Memory is what Linux counts, with what the allocator keeps and cannot use again: batches differ, and
so they do here.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from syncrec.batch.build import build_batch, build_query
from syncrec.batch.views import Batch, move
from syncrec.model import SyNCRec
from syncrec.operations import packed_work, step_operations
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.planning.batch_load import BatchLoad, reached
from trainer.planning.host_memory import peak_bytes, reset_peak

# Of a slice at most: tokens times width times experts, about a second of a core.
_MOST_WORK = 5_000_000
_FEWEST_USERS = 2
_SECONDS = 3.0  # for which steps are repeated, for the quickest of them
_FEWEST_STEPS = 5
_MOST_STEPS = 12
_EVALUATIONS = 4
_EVALUATED = 4  # times as many users as step at once, which take as long


@dataclass(frozen=True)
class Slice:
    """What some users took. tokens: of both views. bytes: beyond what was there before.

    operations: floating-point, of forward and backward. seconds: of the quickest step, 0 where none
    was timed.
    """

    tokens: int
    bytes: int
    operations: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """The dense model's size, and what a step takes of a rank by the tokens of both views.

    weights: trained numbers of the dense model. evaluation: bytes of a validation's step, beyond what
    was there before.
    """

    weights: int
    half: Slice
    whole: Slice
    evaluation: float

    def bytes(self, tokens: float) -> float:
        """Bytes of activations and of what backward needs at most."""
        return self._extrapolate("bytes", tokens)

    def operations(self, tokens: float) -> float:
        """Floating-point operations of forward and backward."""
        return self._extrapolate("operations", tokens)

    def seconds(self, tokens: float) -> float:
        """Seconds of forward, backward and both updates on this machine's processor."""
        return self._extrapolate("seconds", tokens)

    def _extrapolate(self, name: str, tokens: float) -> float:
        """By the straight line through both slices; nothing takes less than in proportion."""
        low = getattr(self.half, name)
        high = getattr(self.whole, name)
        slope = (high - low) / max(1, self.whole.tokens - self.half.tokens)
        # Noise must not tilt the line beyond what begins at nothing, or is level.
        slope = min(max(slope, 0.0), high / max(1, self.whole.tokens))
        return max(0.0, high + slope * (tokens - self.whole.tokens))


def count_weights(config: RunConfig, domains: int) -> int:
    """Trained numbers of the dense model. Nothing is allocated."""
    with torch.device("meta"):
        model = SyNCRec(config.model, domains)
    sizes = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            sizes.append(parameter.numel())
    return sum(sizes)


def try_model(
    config: RunConfig,
    dataset: Dataset,
    load: BatchLoad,
    timed: bool,
    on_device: bool = False,
) -> Trial:
    """Makes the dense model, and steps with slices of the load's sample.

    timed: whether seconds are wanted. on_device: whether it is to stand for a device, which has not
    the processor's fused kernel.
    """
    if on_device:
        config = replace(config, model=replace(config.model, kernel="plain"))
    domains = len(dataset.domains)
    weights = count_weights(config, domains)
    torch.manual_seed(config.seed)
    stepper = _Stepper(config, dataset)
    users_B = load.sample
    work = load.most_tokens * config.model.dim * config.model.experts
    users = len(users_B)
    if work > _MOST_WORK:
        users = max(_FEWEST_USERS, int(users * _MOST_WORK / work))
    # Spread over the batch, which is in no order of lengths that matters.
    half = stepper.measure(users_B[: max(1, users // 2)], timed)
    whole = stepper.measure(users_B[:users], timed)
    evaluated = min(config.evaluation.batch_size, max(1, dataset.users))
    tried = min(evaluated, max(1, int(_EVALUATED * users)))
    taken = stepper.measure_evaluation(tried)
    return Trial(weights, half, whole, taken * evaluated / tried)


class _Stepper:
    """The dense model with its optimizer, and a small table that stands for a rank's rows."""

    def __init__(self, config: RunConfig, dataset: Dataset):
        self._config = config
        self._dataset = dataset
        self._random = np.random.default_rng(config.seed)
        self._model = SyNCRec(config.model, len(dataset.domains))
        self._model.train()
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=optimizer.learning_rate, fused=True
        )

    def measure(self, users_B: np.ndarray, timed: bool) -> Slice:
        """Steps with these users, or with nearly all of them, as batches differ in a run."""
        batch = self._draw(users_B)
        works = packed_work(self._config.model, batch)
        tokens = sum(work.tokens for work in works)
        operations = step_operations(self._config.model, works)
        self._step(batch)  # the optimizer's state is made, kernels too
        before = reset_peak()
        best = self._time_step(batch) / tokens
        begun = time.perf_counter()
        for number in range(1, _MOST_STEPS):
            late = time.perf_counter() - begun > _SECONDS
            if not timed or (late and number >= _FEWEST_STEPS):
                break
            batch = self._draw(self._leave_some_out(users_B))
            works = packed_work(self._config.model, batch)
            taken = self._time_step(batch)
            best = min(best, taken / sum(work.tokens for work in works))
        peak = max(0, peak_bytes() - before) if before else 0
        return Slice(tokens, peak, operations, best * tokens if timed else 0.0)

    def _leave_some_out(self, users_B: np.ndarray) -> np.ndarray:
        """At least three quarters of these users, drawn."""
        fewest = -(-3 * len(users_B) // 4)
        count = int(self._random.integers(fewest, len(users_B) + 1))
        return self._random.permutation(users_B)[:count]

    def measure_evaluation(self, users: int) -> int:
        """Bytes that a validation's steps with so many users take, beyond what was there before."""
        before = reset_peak()
        for _ in range(_EVALUATIONS):
            everyone = max(1, self._dataset.users)
            self._evaluate(self._random.choice(everyone, users, replace=False))
        return max(0, peak_bytes() - before) if before else 0

    def _evaluate(self, users_B: np.ndarray) -> None:
        """A step of a validation, with drawn candidates (trainer/evaluation/sampled.py)."""
        config = self._config
        dataset = self._dataset
        items_N, lengths_B, domain_N = self._draw_histories(users_B)
        negatives = config.evaluation.negatives
        candidates = np.repeat(domain_N[:1], len(users_B) * (1 + negatives))
        built = build_query(
            items_N,
            lengths_B,
            config.model.max_length,
            self._draw_items(candidates),
            domain_N if config.model.predicts_by_both else None,
            len(dataset.domains),
        )
        query = move(built, "cpu")
        rows_NR = torch.zeros(len(query.ids), config.model.dim)
        self._model.eval()
        with torch.no_grad():
            self._model(query, rows_NR.clone())
        self._model.train()

    def _time_step(self, batch: Batch) -> float:
        """Seconds of forward, backward and updates, as in trainer/training/step.py, of one rank alone.

        With one thread those of the processor: what waits for other programs is not this step's.
        """
        clock = time.perf_counter
        if torch.get_num_threads() == 1:
            clock = time.thread_time
        begun = clock()
        self._step(batch)
        return clock() - begun

    def _step(self, batch: Batch) -> None:
        """The step itself; its rows are looked up and updated in a table of their own."""
        batch = move(batch, "cpu")
        rows_UR = torch.zeros(len(batch.distinct), self._config.model.dim)
        used_NR = batch.gather_vectors(rows_UR.clone()).requires_grad_()
        loss, _ = self._model(batch, used_NR)
        loss.backward()
        gradient_NR = used_NR.grad
        assert gradient_NR is not None  # of backward
        gradient_UR = batch.reduce_gradient(gradient_NR)
        square_U = gradient_UR.square().mean(1, keepdim=True)
        rows_UR.sub_(gradient_UR / square_U.sqrt().add_(1.0), alpha=1e-6)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _draw_histories(
        self, users_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """items_N, lengths_B and domain_N of these users, as `build_batch` takes them."""
        max_length = self._config.model.max_length
        lengths_BD = reached(self._dataset, users_B, max_length)
        domains = np.arange(lengths_BD.shape[1])
        parts = []
        for lengths_D in lengths_BD:
            history = np.repeat(domains, lengths_D)
            parts.append(self._random.permutation(history))
        domain_N = np.concatenate(parts)
        return self._draw_items(domain_N), lengths_BD.sum(1), domain_N

    def _draw(self, users_B: np.ndarray) -> Batch:
        """A batch of these users' lengths, whose items are drawn."""
        config = self._config
        dataset = self._dataset
        items_N, lengths_B, domain_N = self._draw_histories(users_B)
        negatives: np.ndarray | list[np.ndarray]
        if config.negatives.shared:
            negatives = []
            for domain in range(len(dataset.domains)):
                wanted = np.full(config.negatives.shared, domain)
                negatives.append(self._draw_items(wanted))
        else:
            wanted = np.repeat(domain_N, config.negatives.per_target)
            drawn = self._draw_items(wanted)
            negatives = drawn.reshape(-1, config.negatives.per_target)
        return build_batch(
            items_N,
            lengths_B,
            domain_N,
            np.ones(len(users_B), np.float32),
            negatives,
            [domain.items for domain in dataset.domains],
            config.model.max_length,
            config.model.mutual_information_pooling,
        )

    def _draw_items(self, domain_N: np.ndarray) -> np.ndarray:
        """A row of M of each of these domains, uniformly."""
        items_D = np.array([domain.items for domain in self._dataset.domains])
        share_N = self._random.random(len(domain_N))
        offset_N = (share_N * items_D[domain_N]).astype(np.int64)
        return self._dataset.starts[domain_N] + offset_N
