"""How fast is a training step, and what does a large item table cost? Ours beside the same
model padded, with dense Adam.

    python benchmarks/train_step.py          5·10⁴ to 10⁷ items, fp32 and bf16: minutes, 7 GB of memory
    python benchmarks/train_step.py --short  5·10⁴ items, few steps
    python benchmarks/train_step.py model.loss=sampled_softmax negatives.shared=1024
    python benchmarks/train_step.py table.placement=cached exponent=1  on CUDA: rows on the host

Ours is `trainer.training.step.Trainer.train_step`: TorchRec table with fused row-wise Adagrad,
packed model, DeepSpeed engine. Batches are built beforehand, as worker processes do, and each
is made ready beside the step before it, as in a run. Nothing is read from a device while steps
are measured: events in its own queue time them. Each line of the table is measured in a process
of its own, so that none inherits another's memory, and each process of ours times the matrix
products of its step too; the least time of each is the machine's.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.multiprocessing import ProcessExitedException

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops, limits, machine, suite
from benchmarks.padded import PaddedSyNCRec, pad_batch
from benchmarks.workload import dataset_of, draw, trainer_of
from embeddings.config import TableConfig
from syncrec.batch.build import build_batch
from syncrec.batch.views import map_tensors, move
from syncrec.config import ModelConfig
from trainer.config.negatives import NegativesConfig
from trainer.distributed import process_group

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset
    from trainer.distributed.process_group import Ranks


OURS = "ours"
PADDED = "padded"
PLAIN = "plain"
# The padded version's tensors as large as the item matrix: itself, its gradient, Adam's two
# moments, and two more for a
# while: gradients of several look-ups that wait to be summed, then what Adam's update of a
# tensor makes on the way.
_DENSE_COPIES = 4
_PASSING_COPIES = 2


@dataclass(frozen=True)
class Settings:
    """settings/train_step.yaml."""

    systems: list[Literal["ours", "padded", "plain"]]
    precision: list[Literal["fp32", "bf16"]]
    items: list[int]
    domains: int
    users: int
    shortest: int
    steps: int
    warmup: int
    window: float
    exponent: float
    model: ModelConfig
    negatives: NegativesConfig
    table: TableConfig

    def __post_init__(self):
        suite.at_least(
            1, self, "domains", "users", "shortest", "steps", "warmup"
        )
        suite.at_least(0, self, "exponent")
        suite.at_least(2 * self.domains, self, "items")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    system: str
    precision: str
    items: int

    def __str__(self):
        return f"{self.system}, {self.precision}, {self.items:,} items"


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("train_step", Settings)
    record = suite.header("train_step", settings, options)
    cases, not_run = plan(settings)
    results = []
    failed = False
    for case in cases:
        begin = time.perf_counter()
        try:
            results.append(suite.in_own_process(measure, case, settings))
        except ProcessExitedException as error:
            not_run.append(
                vars(case)
                | {
                    "reason": f"its process ended ({error}), most likely for want of memory"
                }
            )
            failed = True
            continue
        print(
            f"{case}: {results[-1]['tokens_per_second']:,.0f} tokens/s "
            f"({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    suite.save(
        "train_step",
        record | assembled(results) | {"not_run": not_run},
        options,
    )
    sys.exit(failed)


def plan(settings: Settings) -> tuple[list[Case], list[dict]]:
    """The cases to measure, and what is left out with the arithmetic of why."""
    cases = []
    not_run = []
    for system in settings.systems:
        for precision in settings.precision if system == OURS else ["fp32"]:
            for items in sorted(set(settings.items)):
                case = Case(system, precision, items)
                reason = None
                if precision == "bf16" and not machine.has_bf16(suite.device()):
                    reason = "the processor has no bf16 products"
                elif system != OURS:
                    reason = too_large(
                        items, settings.model.dim, machine.memory_bytes()
                    )
                if reason:
                    not_run.append(vars(case) | {"reason": reason})
                else:
                    cases.append(case)
    return cases, not_run


def too_large(items: int, dim: int, memory: float) -> str | None:
    """Why the padded version cannot train so many items in `memory` bytes, or None where it can."""
    one = items * dim * 4
    kept = _DENSE_COPIES * one
    peak = (_DENSE_COPIES + _PASSING_COPIES) * one
    if peak <= memory:
        return None
    return (
        f"{items:.0e} x {dim} x 4 bytes = {one / 1e9:.1f} GB; weights, gradient and Adam's "
        f"two moments: {kept / 1e9:.1f} GB; "
        f"with {_PASSING_COPIES} more of that size while gradients are summed and weights "
        f"updated: {peak / 1e9:.1f} GB, and "
        f"the machine has {memory / 1e9:.1f} GB"
    )


def measure(case: Case, settings: Settings) -> dict:
    """Times the steps of one case: an entry of the record's `results`. Starts the process group
    of its process.
    """
    with process_group.join_process_group() as ranks:
        return _measure(case, settings, ranks)


def _measure(case, settings, ranks):
    config = replace(settings.model, precision=case.precision)
    count = (
        settings.warmup + settings.steps + 1
    )  # the last is made ready beside the last step
    dataset = dataset_of(case.items, settings.domains, settings.users, count)
    build, work, start = _SYSTEMS[case.system]
    drawn, batches = batches_of(
        build, dataset, settings, config.max_length, ranks.device
    )
    tokens = len(drawn[0][0])
    steps = start(config, settings, ranks, dataset)
    seconds, interval, losses = timed_steps(
        steps(batches), settings.warmup, ranks.device
    )
    batches.pop()
    peak = machine.peak_memory()
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"{case}: the losses are {losses}")
    timed = suite.spread(seconds[settings.warmup :])
    operations = statistics.mean(
        flops.step_operations(config, work(config, batch))
        for batch in batches[settings.warmup :]
    )
    found = vars(case) | {
        "tokens": tokens,
        "users": settings.users,
        "threads": torch.get_num_threads(),
        "step_seconds": timed,
        "warmup_seconds": seconds[: settings.warmup],
        "interval_seconds": interval,
        "tokens_per_second": tokens / timed["median"],
        "users_per_second": settings.users / timed["median"],
        "operations_per_step": operations,
        "operations_per_second": operations / timed["median"],
        "losses": losses,
        "peak_memory_bytes": peak,
        "device_memory_bytes": machine.peak_device_memory(ranks.device),
    }
    if case.system == OURS:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
        products = limits.step_products(config, batches[settings.warmup])
        found["matmul"] = limits.matmul(
            products["experts"] + products["tasks"],
            dtype,
            ranks.device,
            settings.window,
        )
    return found


def batches_of(
    build: Callable, dataset: "Dataset", settings: Any, length: int, device: Any
) -> tuple[list[tuple], list[Any]]:
    """What the steps of `dataset` are built from, and their batches, pinned for a device.

    build: `build_batch` or `pad_batch`. length: T. settings: users, shortest, negatives, exponent.
    """
    steps = dataset.users // settings.users
    domain_items = [domain.items for domain in dataset.domains]
    drawn = []
    batches = []
    for step in range(steps):
        arrays = draw(
            dataset,
            step,
            settings.users,
            settings.shortest,
            length,
            settings.negatives,
            settings.exponent,
        )
        batch = build(*arrays, domain_items, length)
        if device.type == "cuda":
            batch = map_tensors(batch, torch.Tensor.pin_memory)
        drawn.append(arrays)
        batches.append(batch)
    return drawn, batches


class Marks:
    """Moments between steps, set without waiting: events in a device's queue, else the host's
    clock.
    """

    def __init__(self, device: torch.device):
        self._on_device = device.type == "cuda"
        self._marks = []

    def set(self) -> None:
        """Now, or when the device is through with what is queued now."""
        if self._on_device:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append(mark)

    def seconds(self) -> list[float]:
        """From each mark to the next. The device has to be through with the last."""
        pairs = pairwise(self._marks)
        if self._on_device:
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def timed_steps(
    steps: Iterable[torch.Tensor], warmup: int, device: torch.device
) -> tuple[list[float], float, list[float]]:
    """Runs the steps, which yield their losses.

    Returns the seconds of each step, the seconds of all steps after `warmup` together by the host's
    clock, and the losses. The host waits for the device before and after those, and not in between.
    """
    marks = Marks(device)
    losses = []
    marks.set()
    for loss in steps:
        losses.append(loss)
        marks.set()
        if len(losses) == warmup:
            _wait_for(device)
            begin = time.perf_counter()
    _wait_for(device)
    interval = time.perf_counter() - begin
    return marks.seconds(), interval, torch.stack(losses).tolist()


def _wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Each `start_…` returns a function that trains on all batches but the last, and yields each
# loss unread.


def start_ours(
    config: ModelConfig, settings: Settings, ranks: "Ranks", dataset: "Dataset"
) -> Callable:
    """The trainer's own step, with the next batch made ready beside it."""
    trainer = trainer_of(
        config,
        settings.users,
        dataset,
        ranks,
        negatives=settings.negatives,
        table=settings.table,
    )

    def steps(batches):
        ready = trainer.prepare(batches[0])
        left = iter(batches[1:])

        def prepare_next():
            nonlocal ready
            ready = trainer.prepare(next(left))
            return ready

        for _ in batches[1:]:
            yield trainer.train_step(ready, prepare_next)[0]
        trainer.settle()

    return steps


def start_padded(
    config: ModelConfig,
    settings: Settings,
    ranks: "Ranks",
    dataset: "Dataset",
    plain: bool = False,
) -> Callable:
    """One optimizer over everything, as a tutorial has it. plain: and each view reads the item
    matrix for itself.
    """
    torch.manual_seed(0)
    model = (
        PaddedSyNCRec(
            config, len(dataset.domains), dataset.num_embeddings, plain
        )
        .to(ranks.device)
        .train()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss, _ = model(move(batch, ranks.device))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda batches: map(step, batches[:-1])


# How each system builds a batch, counts its work, and starts.
_SYSTEMS = {
    OURS: (build_batch, flops.packed_work, start_ours),
    PADDED: (pad_batch, flops.padded_work, start_padded),
    PLAIN: (
        pad_batch,
        flops.padded_work,
        functools.partial(start_padded, plain=True),
    ),
}


def assembled(results: list[dict]) -> dict:
    """Results, each with its share of the limit of its precision, and the limits: {precision:
    `limits.matmul`}.
    """
    measured = {}
    for result in results:
        if "matmul" in result:
            measured.setdefault(result["precision"], []).append(
                result.pop("matmul")
            )
    found = {
        precision: limits.fastest(of) for precision, of in measured.items()
    }
    for result in results:
        limit = found.get(result["precision"])
        result["matmul_share"] = (
            result["operations_per_second"] / limit["rate"] if limit else None
        )
    return {"limits": found, "results": results}


def table(record: dict) -> str:
    """A line for each case, with what it is of its limit and against the others; the limits;
    what was not run and why.
    """
    speed = {
        tuple(result[key] for key in Case.__annotations__): result[
            "tokens_per_second"
        ]
        for result in record["results"]
    }
    rows = []
    for result in record["results"]:
        against = {
            "times padded": speed.get((PADDED, "fp32", result["items"])),
            "times plain": speed.get((PLAIN, "fp32", result["items"])),
            "times fp32": speed.get(
                (result["system"], "fp32", result["items"])
            ),
            "times fewest items": speed[
                result["system"],
                result["precision"],
                min(of[2] for of in speed),
            ],
        }
        share = result["matmul_share"]
        rows.append(
            {
                "system": f"{result['system']}, {result['precision']}",
                "items": f"{result['items']:,}",
                "tokens/s": f"{result['tokens_per_second']:,.0f}",
                "users/s": f"{result['users_per_second']:,.1f}",
                "step s (min – max)": suite.shown(result["step_seconds"]),
                "of matmul rate": "" if share is None else f"{share:.0%}",
                **{
                    name: f"{result['tokens_per_second'] / other:.2f}"
                    if other
                    else ""
                    for name, other in against.items()
                },
                "memory": f"{result['peak_memory_bytes'] / 1e9:.1f} GB",
            }
        )
    for left_out in record["not_run"]:
        system = f"{left_out['system']}, {left_out['precision']}"
        rows.append(
            {
                "system": system,
                "items": f"{left_out['items']:,}",
                "tokens/s": "not run",
            }
        )
    lines = [suite.markdown(rows)]
    for precision, limit in record["limits"].items():
        lines.append(
            f"\n{precision} products: {limit['rate'] / 1e9:.0f} GFLOP/s at the model's "
            "shapes, a step's "
            f"{limit['operations'] / 1e9:.1f} GFLOP in {limit['seconds_per_step']:.3f} s; "
            "1024 x 1024: "
            f"{limit['square_rate'] / 1e9:.0f} GFLOP/s."
        )
    reasons = {
        left_out["reason"]: f"{left_out['system']}, {left_out['items']:,} items"
        for left_out in record["not_run"]
    }
    lines += [
        f"\nNot run ({what}): {reason}." for reason, what in reasons.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
