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
_MOST_PLAIN_WORK = 2_000_000  # of slow kernels, where nothing is timed
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
        span = self.whole.tokens - self.half.tokens
        slope = (high - low) / max(1, span)
        proportional = high / max(1, self.whole.tokens)
        # Noise must not tilt the line beyond what begins at nothing, or is level.
        slope = max(slope, 0.0)
        slope = min(slope, proportional)
        more = tokens - self.whole.tokens
        return max(0.0, high + slope * more)


def count_weights(config: RunConfig, domains: int) -> int:
    """Trained numbers of the dense model. Nothing is allocated."""
    with torch.device("meta"):
        model = SyNCRec(config.model, domains)
    weights = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            weights += parameter.numel()
    return weights


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
        model = replace(config.model, kernel="plain")
        config = replace(config, model=model)
    domains = len(dataset.domains)
    weights = count_weights(config, domains)
    torch.manual_seed(config.seed)
    stepper = _Stepper(config, dataset)
    users_B = load.sample
    work = load.most_tokens * config.model.dim * config.model.experts
    users = len(users_B)
    most = _MOST_WORK if timed else _MOST_PLAIN_WORK
    if work > most:
        share = most / work
        users = max(_FEWEST_USERS, int(users * share))
    fewer = max(1, users // 2)
    # They are spread over the batch, which is in no order of lengths that matters.
    half = stepper.measure(users_B[:fewer], timed)
    whole = stepper.measure(users_B[:users], timed)
    evaluated = min(config.evaluation.batch_size, dataset.users)
    tried = min(evaluated, _EVALUATED * users if timed else users)
    times = _EVALUATIONS if timed else 1
    taken = stepper.measure_evaluation(tried, times)
    evaluation = taken * evaluated / tried
    return Trial(weights, half, whole, evaluation)


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
        tokens, operations = self._count(batch)
        self._step(batch)  # the optimizer's state is made, kernels too
        before = reset_peak()
        seconds = self._time_step(batch)
        if timed:
            seconds = self._find_quickest(users_B, seconds / tokens) * tokens
        else:
            seconds = 0.0
        return Slice(tokens, _taken_since(before), operations, seconds)

    def _find_quickest(self, users_B: np.ndarray, best: float) -> float:
        """Seconds a token of the quickest of some steps. best: those of a first one."""
        begun = time.perf_counter()
        for number in range(1, _MOST_STEPS):
            elapsed = time.perf_counter() - begun
            if number >= _FEWEST_STEPS and elapsed > _SECONDS:
                break
            some_B = self._leave_some_out(users_B)
            batch = self._draw(some_B)
            tokens, _ = self._count(batch)
            seconds = self._time_step(batch)
            best = min(best, seconds / tokens)
        return best

    def _count(self, batch: Batch) -> tuple[int, int]:
        """A batch's tokens in both views, and its operations."""
        works = packed_work(self._config.model, batch)
        tokens = 0
        for work in works:
            tokens += work.tokens
        return tokens, step_operations(self._config.model, works)

    def _leave_some_out(self, users_B: np.ndarray) -> np.ndarray:
        """At least three quarters of these users, drawn."""
        most = len(users_B)
        fewest = -(-3 * most // 4)
        count = self._random.integers(fewest, most + 1)
        mixed_B = self._random.permutation(users_B)
        return mixed_B[:count]

    def measure_evaluation(self, users: int, times: int) -> int:
        """Bytes that some steps of a validation with so many users take, beyond what was there."""
        before = reset_peak()
        for _ in range(times):
            users_B = self._random.choice(
                self._dataset.users, users, replace=False
            )
            self._evaluate(users_B)
        return _taken_since(before)

    def _evaluate(self, users_B: np.ndarray) -> None:
        """A step of a validation, with drawn candidates (trainer/evaluation/sampled.py)."""
        config = self._config
        dataset = self._dataset
        items_N, lengths_B, domain_N = self._draw_histories(users_B)
        candidates = len(users_B) * (1 + config.evaluation.negatives)
        # Their domains do not matter here.
        first = np.zeros(candidates, np.int64)
        known_N = None
        if config.model.predicts_by_both:
            known_N = domain_N
        built = build_query(
            items_N,
            lengths_B,
            config.model.max_length,
            self._draw_items(first),
            known_N,
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
        # As costly as the table's own optimizers.
        square_UR = gradient_UR.square()
        norm_U1 = square_UR.mean(1, keepdim=True).sqrt_()
        update_UR = gradient_UR / norm_U1.add_(1.0)
        rows_UR.sub_(update_UR)
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
        item_counts = [domain.items for domain in dataset.domains]
        weight_B = np.ones(len(users_B), np.float32)
        return build_batch(
            items_N,
            lengths_B,
            domain_N,
            weight_B,
            negatives,
            item_counts,
            config.model.max_length,
            config.model.mutual_information_pooling,
            accumulation=config.accumulation,
        )

    def _draw_items(self, domain_N: np.ndarray) -> np.ndarray:
        """A row of M of each of these domains, uniformly."""
        item_counts = [domain.items for domain in self._dataset.domains]
        items_N = np.array(item_counts)[domain_N]
        share_N = self._random.random(len(domain_N))
        offset_N = share_N * items_N
        start_N = self._dataset.starts[domain_N]
        return start_N + offset_N.astype(np.int64)


def _taken_since(before: int) -> int:
    """Bytes at most since `reset_peak` gave so many; 0 where Linux does not say."""
    if before == 0:
        return 0
    return max(0, peak_bytes() - before)
