"""Where does the time of a training step go, and how far is each part from what the hardware
could do?

    python benchmarks/parts.py            10⁶ items, fp32 and bf16, collectives at 2 ranks
    python benchmarks/parts.py --short    10⁵ items, few repeats
    python benchmarks/parts.py model.dim=512 users=128

The workload is that of train_step.py. Three kinds of lines:

- Parts of a step, timed within `Trainer.train_step` by standing between it and its table and
  engine: together with *the rest* they are the step.
- Parts of the model, each made again alone: the calls of the expert stacks, of gates and
  towers, and of the losses are noted in a forward pass with their inputs, and repeated with and
  without their backward. What is between them (the input layer, mixing experts) is in no line.
- Collectives between ranks of this machine: what the step exchanges, at its sizes, and table
  look-up and update with their exchange. Each rank has the users of a step of its own.

The limit of a part is the least time that the hardware measured in the same run needs for it
(`limits.py`):

- products: its matrix products at their own shapes. Attention's products and all that works
  element by element add nothing.
- rows: bytes of the rows read and written by the rate of rows gathered at random. An update
  reads a gradient for each look-up, and reads and writes each distinct row.
- memory: bytes that have to be read and written once, by the rate of a copy or, for Adam (4
  numbers of each weight read, 3 written), of an addition.
- wire: bytes sent, by the rate of the same collective with many more; for λ's sums the time of
  a collective of one number.
"""

import functools
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits, machine, suite
from benchmarks.workload import dataset_of, draw, trainer_of
from syncrec.batch.build import build_batch
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from trainer.config.negatives import NegativesConfig
from trainer.distributed import process_group

if TYPE_CHECKING:
    from syncrec.batch.views import Batch
    from trainer.distributed.process_group import Ranks


@dataclass(frozen=True)
class Settings:
    """settings/parts.yaml."""

    precision: list[Literal["fp32", "bf16"]]
    items: int
    domains: int
    users: int
    shortest: int
    ranks: int
    repeats: int
    warmup: int
    window: float
    memory_bytes: int
    wire_bytes: int
    model: ModelConfig
    negatives: NegativesConfig

    def __post_init__(self):
        suite.at_least(
            1,
            self,
            "domains",
            "users",
            "shortest",
            "repeats",
            "warmup",
            "memory_bytes",
            "wire_bytes",
        )
        suite.at_least(2, self, "ranks")
        suite.at_least(2 * self.domains, self, "items")


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("parts", Settings)
    record = suite.header("parts", settings, options) | {
        "results": [],
        "limits": {},
        "not_run": [],
    }
    for precision in settings.precision:
        if precision == "bf16" and not machine.has_bf16(suite.device()):
            record["not_run"].append(
                {
                    "precision": precision,
                    "reason": "the processor has no bf16 products",
                }
            )
            continue
        lines, record["limits"][precision] = suite.in_own_process(
            measure, settings, precision
        )
        record["results"] += [{"precision": precision} | line for line in lines]
    if (
        suite.device().type == "cpu"
        or torch.cuda.device_count() >= settings.ranks
    ):
        lines, record["limits"][f"{settings.ranks} ranks"] = suite.on_ranks(
            settings.ranks, measure_collectives, settings
        )
        record["results"] += [{"precision": "fp32"} | line for line in lines]
    else:
        record["not_run"].append(
            {
                "precision": "fp32",
                "reason": f"{settings.ranks} ranks need as many GPUs",
            }
        )
    suite.save("parts", record, options)


def measure(settings: Settings, precision: str) -> tuple[list[dict], dict]:
    """Parts of a step and of the model: lines of the record's `results`, and their limits."""
    with process_group.join_process_group() as ranks:
        config = replace(settings.model, precision=precision)
        trainer, drawn, domain_items = started(config, settings, ranks)
        built, batches = timed_calls(
            lambda arrays: build_batch(
                *arrays, domain_items, config.max_length
            ),
            drawn,
            ranks.device,
        )
        batch = batches[-1]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        everything, forward = (
            limits.step_products(config, batch, backward)
            for backward in (True, False)
        )
        row = 4 * config.dim
        products = limits.matmul(
            everything["experts"] + everything["tasks"],
            dtype,
            ranks.device,
            settings.window,
        )
        rates = limits.memory(
            ranks.device, row, settings.memory_bytes, window=settings.window
        )

        seconds = defaultdict(list)
        trainer.table = Between(trainer.table, "table", seconds, ranks.device)
        trainer.engine = Between(
            trainer.engine, "engine", seconds, ranks.device
        )
        whole, _ = timed_calls(trainer.train_step, batches, ranks.device)
        pairs = zip(
            seconds.pop("table.exchange"),
            seconds.pop("table.look_up"),
            strict=True,
        )
        seconds["table look-up"] = [sum(pair) for pair in pairs]
        of_products = functools.partial(limits.seconds_of, products)
        least_forward = of_products(forward["experts"] + forward["tasks"])
        least_backward = products["seconds_per_step"] - least_forward
        looked_up = 2 * len(batch.distinct) * row / rates["gather"]
        updated = update_bytes(batch.distinct, row) / rates["gather"]
        stepped = 7 * 4 * trainer.weights / rates["add"]
        named = {
            "table look-up": ("table look-up", "rows", looked_up),
            "engine": ("model forward", "products", least_forward),
            "engine.backward": ("model backward", "products", least_backward),
            "table.update": ("table update", "rows", updated),
            "engine.step": ("dense optimizer step", "memory", stepped),
        }
        lines = _lines_of_step(settings, seconds, named, whole)

        parts_of_model = model_parts(
            config,
            settings,
            batch,
            everything,
            forward,
            of_products,
            rates,
            ranks.device,
        )
        for name, made, least in parts_of_model:
            lines.append(limited(line(name, made), name, *least))
        size = sum(values.nbytes for values in tensors(batch))
        lines.append(
            limited(
                line("batch building", built[-settings.repeats :]),
                "batch building",
                "memory",
                2 * size / rates["copy"],
            )
        )
        return lines, {"products": products, "memory": rates}


def _lines_of_step(settings, seconds, named, whole):
    """A line for each named part of a step, for the rest of it, and for the whole.

    seconds: of each part that was called. named: (name, what limits it, its limit) of those that
    are shown. whole: seconds of each step.
    """
    count = settings.warmup + settings.repeats
    steps = {}
    for name, values in seconds.items():
        if len(values) == count:
            steps[name] = line(name, values[-settings.repeats :])
    lines = [limited(steps[name], *of) for name, of in named.items()]
    whole = whole[-settings.repeats :]
    rest = list(whole)
    for repeat in range(len(whole)):
        spent = sum(of["seconds"]["all"][repeat] for of in lines)
        rest[repeat] = whole[repeat] - spent
    lines.append(line("the rest", rest))
    least = sum(of[2] for of in named.values())
    lines.append(
        limited(line("step", whole), "step", "sum of the above", least)
    )
    return lines


def started(config: ModelConfig, settings: Settings, ranks: "Ranks") -> tuple:
    """A trainer, what its batches are built from, as many as are needed, and the items of each
    domain.
    """
    count = settings.warmup + settings.repeats
    dataset = dataset_of(
        settings.items,
        settings.domains,
        settings.users * ranks.world_size,
        count,
    )
    dataset = replace(dataset, streams=ranks.world_size)
    trainer = trainer_of(
        config, settings.users, dataset, ranks, negatives=settings.negatives
    )
    places = [ranks.rank + ranks.world_size * step for step in range(count)]
    drawn = [
        draw(
            dataset,
            at,
            settings.users,
            settings.shortest,
            config.max_length,
            settings.negatives,
        )
        for at in places
    ]
    return trainer, drawn, [domain.items for domain in dataset.domains]


def update_bytes(distinct: torch.Tensor, row: int) -> int:
    """Of each row a gradient read, the row read and written."""
    return 3 * len(distinct) * row


def model_parts(
    config: ModelConfig,
    settings: Settings,
    batch: "Batch",
    everything: Any,
    forward: Callable[[], Any],
    of_products: dict,
    rates: dict,
    device: torch.device,
):
    """Each part of a model that no engine has, alone: (name, seconds of each repeat, (what
    limits it, its limit)).
    """
    torch.manual_seed(0)
    model = SyNCRec(config, settings.domains).to(device).train()
    batch = move(batch, device)
    rows = (
        torch.randn(len(batch.inverse), config.dim, device=device)
        .mul_(0.05)
        .requires_grad_()
    )
    experts, tasks, losses = noted(model, lambda: model(batch, rows))
    read = 4 * sum(values.numel() for call in losses for values in call.leaves)
    parts = [
        (
            "experts forward",
            experts,
            False,
            ("products", of_products(forward["experts"])),
        ),
        (
            "experts forward and backward",
            experts,
            True,
            ("products", of_products(everything["experts"])),
        ),
        (
            "gates and towers, forward and backward",
            tasks,
            True,
            ("products", of_products(everything["tasks"])),
        ),
        (
            "losses, forward and backward",
            losses,
            True,
            ("memory", 2 * read / rates["copy"]),
        ),
    ]
    for name, calls, backward, least in parts:
        seconds, _ = timed_calls(
            lambda _: again(calls, backward),  # noqa: B023 (called at once)
            range(settings.warmup + settings.repeats),
            device,
        )
        yield name, seconds[settings.warmup :], least


@dataclass(frozen=True)
class Call:
    """A call as it was made. leaves: its own tensors that want a gradient, and weights that it
    may use.
    """

    function: Any
    arguments: tuple
    graph: bool
    autocast: bool
    leaves: tuple
    weights: tuple


def noted(
    model: SyNCRec, forward: Callable[[], Any]
) -> tuple[list[Call], list[Call], list[Call]]:
    """The calls of experts, of gates and towers, and of the losses in `forward()`: three lists
    of `Call`.
    """
    experts = []
    tasks = []
    of_losses = []

    def note(calls, function, arguments, weights):
        arguments = [own(value) for value in arguments]
        leaves = tuple(
            value
            for value in arguments
            if isinstance(value, torch.Tensor) and value.requires_grad
        )
        state = (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(weights[0].device.type),
        )
        calls.append(Call(function, tuple(arguments), *state, leaves, weights))

    def own(value):
        return (
            value.detach().requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
        )

    def hook(module, calls):
        def noting(module, arguments):
            note(calls, module, arguments, tuple(module.parameters()))

        return module.register_forward_pre_hook(noting)

    stacks = (model.cross_experts, model.single_experts)
    of_tasks = (model.cross_gate, model.single_gates)
    of_tasks += (model.cross_tower, model.single_towers)
    hooks = [hook(stack, experts) for stack in stacks if stack is not None]
    hooks += [hook(module, tasks) for module in of_tasks]
    losses = model._compute_losses

    def noting(*arguments):
        note(of_losses, losses, arguments, tuple(model.parameters()))
        return losses(*arguments)

    model._compute_losses = noting
    forward()
    del model._compute_losses
    for handle in hooks:
        handle.remove()
    return experts, tasks, of_losses


def again(calls: list[Call], backward: bool) -> None:
    """Makes the calls anew; backward: and computes the gradients of everything that they were
    given and of their weights.
    """
    for call in calls:
        device = call.weights[0].device.type
        with (
            torch.set_grad_enabled(call.graph),
            torch.autocast(
                device,
                torch.bfloat16,
                enabled=call.autocast,
                cache_enabled=False,
            ),
        ):
            output = call.function(*call.arguments)
        output = output[0] if isinstance(output, tuple) else output
        if backward and output.requires_grad:
            torch.autograd.grad(
                output,
                [*call.leaves, *call.weights],
                torch.ones_like(output),
                allow_unused=True,
            )


class Between:
    """Stands for an object and notes how long its methods take: seconds[name] and
    seconds[name.method], a list each.
    """

    def __init__(
        self, inner: Any, name: str, seconds: dict, device: torch.device
    ):
        self._inner = inner
        self._name = name
        self._seconds = seconds
        self._device = device

    def __call__(self, *arguments, **named):
        return self._timed(self._name, self._inner, *arguments, **named)

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        return (
            functools.partial(self._timed, f"{self._name}.{name}", value)
            if inspect.ismethod(value)
            else value
        )

    def _timed(self, name, function, *arguments, **named):
        wait(self._device)
        begin = time.perf_counter()
        value = function(*arguments, **named)
        wait(self._device)
        self._seconds[name].append(time.perf_counter() - begin)
        return value


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_calls(
    function: Callable[[Any], Any], values: list, device: torch.device
) -> tuple[list[float], list]:
    """Seconds of `function(value)` for each value, and what it returned."""
    seconds = []
    returned = []
    for value in values:
        wait(device)
        begin = time.perf_counter()
        returned.append(function(value))
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return seconds, returned


def tensors(value: Any):
    """All tensors in a dataclass, and in dataclasses and tuples in it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))


def measure_collectives(settings: Settings) -> tuple[list[dict], dict]:
    """What ranks exchange in a step: lines of the record's `results`, and their limits. Called
    on every rank.
    """
    with process_group.join_process_group() as ranks:
        return _measure_collectives(settings, ranks)


def _measure_collectives(settings, ranks):
    config = settings.model
    world = ranks.world_size
    device = ranks.device
    trainer, drawn, domain_items = started(config, settings, ranks)
    every = [
        build_batch(*arrays, domain_items, config.max_length).distinct.to(
            device
        )
        for arrays in drawn
    ]
    ids = every[-1]
    row = 4 * config.dim
    others = (world - 1) / world
    wire = limits.collectives(ranks, settings.window, settings.wire_bytes)
    rates = limits.memory(
        device, row, settings.memory_bytes, window=settings.window
    )
    fewest = torch.tensor(
        len(ids), device=device
    )  # ranks have more or less alike
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    even = int(fewest) // world * world
    rows = torch.ones(even, config.dim, device=device)
    numbers = torch.ones(even, dtype=torch.int64, device=device)
    back = torch.empty_like(rows)
    got = torch.empty_like(numbers)
    gradients = torch.zeros(trainer.weights, device=device)
    sums = torch.zeros(8 * settings.domains, dtype=torch.float64, device=device)
    pooled = torch.zeros(
        settings.users, settings.domains, config.dim, device=device
    )
    exchange = others * rows.nbytes / wire["all_to_all"]
    looked_up = 2 * len(ids) * row / rates["gather"] + exchange
    updated = update_bytes(ids, row) / rates["gather"] + exchange
    seconds = defaultdict(list)
    table = Between(trainer.table, "table", seconds, device)
    calls = {
        "all-to-all of ids": (
            "wire",
            others * numbers.nbytes / wire["all_to_all"],
            lambda: dist.all_to_all_single(got, numbers),
        ),
        "all-to-all of rows": (
            "wire",
            exchange,
            lambda: dist.all_to_all_single(back, rows),
        ),
        "all-reduce of dense gradients": (
            *("wire", 2 * others * gradients.nbytes / wire["all_reduce"]),
            lambda: dist.all_reduce(gradients),
        ),
        "sums for λ": (
            "wire",
            wire["latency"],
            lambda: trainer.reduction.start_sum(sums)(),
        ),
        "gather for SC-MIM": (
            "wire",
            (world - 1) * pooled.nbytes / wire["all_to_all"],
            lambda: trainer.reduction.gather(pooled),
        ),
    }
    lines = []
    for name, (what, least, call) in calls.items():
        slowest = slowest_rank(timed_together(call, settings), device)
        lines.append(limited(line(name, slowest), name, what, least))
    for ids in every:
        dist.barrier()
        vectors = table(ids)
        dist.barrier()
        table.update(torch.ones_like(vectors))
    for name, key, least in (
        ("table look-up", "table", looked_up),
        ("table update", "table.update", updated),
    ):
        slowest = slowest_rank(seconds[key][settings.warmup :], device)
        lines.append(
            limited(
                line(name, slowest),
                f"{name} and exchange",
                "rows and wire",
                least,
            )
        )
    return [of | {"ranks": world} for of in lines], {
        "wire": wire,
        "memory": rates,
    }


def timed_together(call: Callable[[], Any], settings: Settings) -> list[float]:
    """Seconds of `call()`, begun by all ranks at once."""
    seconds = []
    for _ in range(settings.warmup + settings.repeats):
        dist.barrier()
        begin = time.perf_counter()
        call()
        wait(suite.device())
        seconds.append(time.perf_counter() - begin)
    return seconds[settings.warmup :]


def slowest_rank(seconds: list[float], device: torch.device) -> list[float]:
    """Each repeat's time on the rank that took longest."""
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def line(name: str, seconds: list[float]) -> dict:
    """A line of the record's `results` without a limit."""
    return {"part": name, "seconds": suite.spread(seconds)}


def limited(found: dict, name: str, limit: str, least: float) -> dict:
    """A line with its name, what limits it, the least seconds by that, and their share of the
    time.
    """
    return found | {
        "part": name,
        "limit": limit,
        "limit_seconds": least,
        "share": least / found["seconds"]["median"],
    }


def table(record: dict) -> str:
    """A line for each part, a group of columns for each precision."""
    rows = {}
    for result in record["results"]:
        name = (
            result["part"]
            if "ranks" not in result
            else f"{result['ranks']} ranks: {result['part']}"
        )
        row = rows.setdefault(name, {"part": name, "limit": ""})
        precision = result["precision"]
        milliseconds = {
            of: 1000 * result["seconds"][of] for of in ("median", "min", "max")
        }
        row[f"{precision} ms (min – max)"] = suite.shown(milliseconds, 2)
        if "limit" in result:
            row["limit"] = result["limit"]
            row[f"{precision} limit ms"] = (
                f"{1000 * result['limit_seconds']:.2f}"
            )
            row[f"{precision} share"] = f"{result['share']:.0%}"
    notes = [
        f"Limits, {name}: {_rates(found)}."
        for name, found in record["limits"].items()
    ]
    notes += [
        f"{left_out['precision']} not run: {left_out['reason']}."
        for left_out in record["not_run"]
    ]
    return "\n\n".join([suite.markdown(list(rows.values())), *notes])


def _rates(found):
    """The limits of one run of processes in words."""
    named = {"copy": "copy", "add": "addition", "gather": "rows at random"}
    words = [
        f"{name} {found['memory'][key] / 1e9:.1f} GB/s"
        for key, name in named.items()
    ]
    if "products" in found:
        words.append(
            f"products {found['products']['rate'] / 1e9:.0f} GFLOP/s at the model's shapes"
        )
    if "wire" in found:
        wire = found["wire"]
        words += [
            f"{name.replace('_', '-')} {wire[name] / 1e9:.2f} GB/s"
            for name in ("all_to_all", "all_reduce")
        ]
        words.append(
            f"a collective of one number {wire['latency'] * 1e6:,.0f} µs"
        )
    return ", ".join(words)


if __name__ == "__main__":
    main()
