"""How many kernels does a training step ask a device for, by part, and do domains add to them?

    python benchmarks/operators.py            2, 5 and 9 domains, fp32 and bf16
    python benchmarks/operators.py --short    2 and 5 domains, fp32
    python benchmarks/operators.py negatives.shared=0

A kernel costs a device's host some 5 to 10 µs, whatever its size: below some thousand users that is
what a step takes. Here no device is needed. PyTorch's operators are counted on a CPU, one each,
without those that launch nothing: views, allocations, reads of a tensor's shape. Some operators
are several kernels on a device, and some of what is counted would stay on its host. So the figures
are for comparison with each other.

An operator of backward belongs to the part whose forward it is the gradient of. Each node of
autograd's graph has a number, which rises; what is entered and left in forward notes it.

What a device does otherwise than a CPU is replaced: a mask of dropout is one operator, experts
are PyTorch's own operators (`kernel=plain`), and in bf16 attention is one operator, as where a
device has FlashAttention. In fp32 it is one for each bucket of lengths.
"""

import bisect
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from benchmarks.workload import dataset_of, draw, trainer_of
from syncrec.batch.build import build_batch
from syncrec.batch.views import Batch
from syncrec.config import ModelConfig
from syncrec.layers import dropout, transformer, varlen
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.distributed import process_group

if TYPE_CHECKING:
    from trainer.training.step import Trainer

EXCHANGE = "batch, exchange of ids"
LOOK_UP = "look-up"
INPUTS = "inputs of both views"
ATTENTION = "attention"
EXPERTS = "experts besides"
TASKS = "gates and towers"
LOSSES = "losses"
GRADIENTS = "dense gradients"
UPDATE = "update of both"
PARTS = (
    EXCHANGE,
    LOOK_UP,
    INPUTS,
    ATTENTION,
    EXPERTS,
    TASKS,
    LOSSES,
    GRADIENTS,
    UPDATE,
)

_STEPS = 3  # the last one is counted
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_same_size",
    "is_pinned",
    "_local_scalar_dense",
    "record_stream",
    "set_",
    "resize_",
    "_unsafe_view",
    "_record_function_enter_new",
    "_record_function_exit",
}


@dataclass(frozen=True)
class Settings:
    """settings/operators.yaml."""

    precision: list[Literal["fp32", "bf16"]]
    domains: list[int]
    items: int
    users: int
    shortest: int
    zero_stage: int
    model: ModelConfig
    negatives: NegativesConfig

    def __post_init__(self) -> None:
        suite.at_least(1, self, "domains", "users", "shortest")
        suite.at_least(2 * max(self.domains), self, "items")


class OperatorCounter(TorchDispatchMode):
    """Counts operators that would launch a kernel, by the part that is entered.

    Example: `with OperatorCounter() as counter:` around `(x.view(2, 2) + 1).exp()` has
    `counter.total("")` 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.counts: dict[str, Counter[str]] = {}
        self.backward: dict[str, Counter[str]] = {}
        # From which of autograd's numbers on nodes are of which part; both rise together.
        self._numbers: list[int] = []
        self._parts: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Counts the operator and has it done."""
        if launches(func):
            node = torch._C._current_autograd_node()
            counts = self.counts
            part = self.part
            if node is not None:
                counts = self.backward
                part = self._part_of(node)
            of_part = counts.setdefault(part, Counter())
            of_part[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    def _part_of(self, node: Any) -> str:
        """The part whose forward has made a node; the part that is entered where none has."""
        number = node._sequence_nr()
        # A gradient's last stop, at the weight itself, has no number of its own.
        if number >= torch.autograd._get_sequence_nr():
            return self.part
        position = bisect.bisect_right(self._numbers, number) - 1
        return self._parts[position] if position >= 0 else self.part

    def clear(self) -> None:
        """Begins anew."""
        self.counts.clear()
        self.backward.clear()

    @contextlib.contextmanager
    def entered(self, part: str) -> Iterator[None]:
        """Within it, operators are counted as this part's."""
        before = self.part
        self._enter(part)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, part: str) -> None:
        self.part = part
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._parts.append(part)

    def wrap(
        self, part: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The function, whose operators are this part's."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            with self.entered(part):
                return function(*arguments, **named)

        return counted

    def total(self, part: str) -> int:
        """How many operators a part had in forward."""
        return self.counts.get(part, Counter()).total()

    def total_backward(self, part: str) -> int:
        """How many operators a part had in backward."""
        return self.backward.get(part, Counter()).total()


def launches(operator: Any) -> bool:
    """Whether an operator would launch a kernel: no view, no allocation, nothing about shapes."""
    schema = operator._schema
    name = schema.name.rpartition("::")[2]
    if name in _NO_KERNEL or name.startswith("sym_"):
        return False
    if not schema.returns:
        return True
    return not any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in schema.returns
    )


@torch.library.custom_op("benchmarks::dropout_mask", mutates_args=())
def _dropout_mask(like: Tensor) -> Tensor:
    return torch.ones_like(like)


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def _attention(qkv_MR: Tensor) -> Tensor:
    return qkv_MR[:, : qkv_MR.shape[1] // 3].clone()


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def _attention_backward(gradient_MR: Tensor) -> Tensor:
    return gradient_MR.repeat(1, 3)


def _backward_of_attention(_context: Any, gradient_MR: Tensor) -> Tensor:
    return _attention_backward(gradient_MR)


torch.library.register_autograd("benchmarks::attention", _backward_of_attention)


@contextlib.contextmanager
def as_on_device(packed_attention: bool) -> Iterator[None]:
    """Has the model ask for what it would ask a device for; this module's head says where."""

    def attend(
        qkv_MR: Tensor, _begins: Tensor, _longest: int, _heads: int
    ) -> Tensor:
        return _attention(qkv_MR)

    def draw_mask(like: Tensor, _share: float) -> Tensor:
        return _dropout_mask(like.detach())

    def available(*_: object) -> bool:
        return packed_attention

    with (
        mock.patch.object(dropout, "_draw_mask", draw_mask),
        mock.patch.object(varlen, "available", available),
        mock.patch.object(varlen, "_attend", attend),
    ):
        yield


def main() -> None:
    """Counts, prints, writes."""
    settings, options = suite.settings("operators", Settings)
    record = suite.header("operators", settings, options)
    results = []
    for precision in settings.precision:
        for domains in settings.domains:
            result = suite.in_own_process(
                count_step, settings, precision, domains
            )
            results.append(result)
    suite.save("operators", record | {"results": results}, options)


def count_step(
    settings: Settings, precision: Literal["fp32", "bf16"], domains: int
) -> dict[str, Any]:
    """The operators of a training step by part: a line of the record's `results`."""
    config = replace(settings.model, precision=precision, kernel="plain")
    with process_group.join_process_group() as ranks:
        dataset = dataset_of(settings.items, domains, settings.users, _STEPS)
        trainer = trainer_of(
            config,
            settings.users,
            dataset,
            ranks,
            negatives=settings.negatives,
            optimizer=OptimizerConfig(zero_stage=settings.zero_stage),
        )
        counter = OperatorCounter()
        _enter_parts(counter, trainer)
        domain_items = [domain.items for domain in dataset.domains]
        packed = precision == "bf16"
        with as_on_device(packed), functions_entered(counter):
            for step in range(_STEPS):
                drawn = draw(
                    dataset,
                    step,
                    settings.users,
                    settings.shortest,
                    config.max_length,
                    settings.negatives,
                )
                batch = build_batch(*drawn, domain_items, config.max_length)
                counter.clear()
                with counter, counter.entered(UPDATE):
                    trainer.train_step(batch)
    return {
        "precision": precision,
        "domains": domains,
        "parts": {part: counter.total(part) for part in PARTS},
        "backward": {part: counter.total_backward(part) for part in PARTS},
        "operators": _by_name(counter.counts),
        "backward_operators": _by_name(counter.backward),
    }


def _by_name(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Each part's operators, the most frequent first."""
    return {part: dict(of.most_common()) for part, of in counts.items()}


def _enter_parts(counter: OperatorCounter, trainer: "Trainer") -> None:
    """Has the trainer's calls counted as their parts. What is in none is the update."""
    model = trainer.model
    wrapped: list[tuple[Any, str, str]] = [
        (trainer, "prepare", EXCHANGE),
        (trainer._prefetcher, "take", EXCHANGE),
        (trainer.table, "look_up", LOOK_UP),
        (model, "forward", TASKS),
        (model, "tokens", INPUTS),
        (model.cross_experts, "forward", EXPERTS),
        (model, "_compute_losses", LOSSES),
        (trainer.engine, "backward", GRADIENTS),
    ]
    if model.single_experts is not None:
        wrapped.append((model.single_experts, "forward", EXPERTS))
    for owner, name, part in wrapped:
        setattr(owner, name, counter.wrap(part, getattr(owner, name)))


@contextlib.contextmanager
def functions_entered(counter: OperatorCounter) -> Iterator[None]:
    """Has what the trainer's objects do not call as methods of their own counted as its part."""
    gather = counter.wrap(LOOK_UP, Batch.gather_vectors)
    attend = counter.wrap(ATTENTION, transformer.causal_attention)
    with (
        mock.patch.object(Batch, "gather_vectors", gather),
        mock.patch.object(transformer, "causal_attention", attend),
    ):
        yield


def table(record: dict[str, Any]) -> str:
    """A line for each part, forward + backward; a column for each precision and number of domains."""
    rows: dict[str, dict[str, str]] = {}
    for result in record["results"]:
        column = f"{result['precision']}, D = {result['domains']}"
        for part, forward in result["parts"].items():
            row = rows.setdefault(part, {"part": part})
            row[column] = f"{forward:,} + {result['backward'][part]:,}"
        row = rows.setdefault("step", {"part": "step"})
        total = sum(result["parts"].values()) + sum(result["backward"].values())
        row[column] = f"{total:,}"
    # The step stands below its parts, whichever came first.
    rows["step"] = rows.pop("step")
    return suite.markdown(list(rows.values()))


if __name__ == "__main__":
    main()
