"""What the hardware could do, measured in the same run as what is held against it.

- `matmul`: the time of a step's matrix products at the model's own shapes, and the rate at
  which a large square one runs.
- `memory`: bytes a second of a copy, of an addition, and of rows gathered at random, the
  natural limit of the item table.
- `collectives`: bytes a second that a rank sends to the others of its group, and the time of a
  collective of hardly any bytes.

The best of several windows counts: a limit is what the hardware can do, and other processes
only slow it down.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from syncrec.batch.views import Batch
    from syncrec.config import ModelConfig
    from trainer.distributed.process_group import Ranks


_WINDOWS = 5
_SQUARE = 1024


@dataclass(frozen=True)
class Product:
    """`experts` products (rows, inner) @ (inner, columns) side by side. flipped: "left" or
    "right" where that operand is a transposed view, as autograd has it in the products of
    backward; "" for none.
    """

    experts: int
    rows: int
    inner: int
    columns: int
    flipped: str = ""

    @property
    def operations(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.experts * self.rows * self.inner * self.columns

    def __str__(self):
        left, right = (
            f"({rows}, {columns})"
            for rows, columns in (
                (self.rows, self.inner),
                (self.inner, self.columns),
            )
        )
        marks = "ᵀ" * (self.flipped == "left"), "ᵀ" * (self.flipped == "right")
        return f"{self.experts} x {left}{marks[0]} @ {right}{marks[1]}"

    def operands(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Left, right and the result's place."""

        def drawn(rows, columns, flipped):
            shape = (
                (self.experts, columns, rows)
                if flipped
                else (self.experts, rows, columns)
            )
            values = torch.randn(shape, device=device).to(dtype)
            return values.transpose(1, 2) if flipped else values

        left = drawn(self.rows, self.inner, self.flipped == "left")
        right = drawn(self.inner, self.columns, self.flipped == "right")
        out = torch.empty(
            self.experts, self.rows, self.columns, dtype=dtype, device=device
        )
        # One expert is a plain product, as a linear layer computes it.
        return (
            tuple(tensor[0] for tensor in (left, right, out))
            if self.experts == 1
            else (left, right, out)
        )


def step_products(
    config: "ModelConfig", batch: "Batch", backward: bool = True
) -> dict[str, Counter]:
    """The products of a step of the packed model: {"experts", "tasks" (gates and towers)}, a
    Counter of `Product` each.

    Those of attention and scores are left out. backward: False for forward's alone.

    Each view runs all experts forward, and those that learn from it backward (equations 2 and 4).
    """
    dim = config.dim
    inner = config.ffn_dim
    experts = Counter()
    tasks = Counter()
    cross = config.cross_experts
    single = config.experts - config.cross_experts
    for view, live, stopped in (
        (batch.cross, cross, single),
        (batch.single, single, cross),
    ):
        for ways in ((dim, 3 * dim), (dim, dim), (dim, inner), (inner, dim)):
            experts += _layer(
                live, len(view.input_M), *ways, backward, config.blocks
            )
            experts += _layer(
                stopped, len(view.input_M), *ways, False, config.blocks
            )
        for begin, end in pairwise(view.task_starts):
            for ways in ((dim, config.experts), (dim, inner), (inner, dim)):
                tasks += _layer(1, end - begin, *ways, backward)
    return {"experts": experts, "tasks": tasks}


def _layer(experts, tokens, inner, columns, backward, times=1):
    """A linear layer's products, `times` times."""
    products = [Product(experts, tokens, inner, columns)]
    if (
        backward
    ):  # gradients of the input: grad @ Wᵀ, and of the weights: Xᵀ @ grad
        products += [
            Product(experts, tokens, columns, inner, "right"),
            Product(experts, inner, tokens, columns, "left"),
        ]
    return Counter(products * times if tokens else [])


def matmul(
    products: Counter,
    dtype: torch.dtype,
    device: torch.device,
    window: float = 0.1,
) -> dict:
    """How fast the device multiplies: {"seconds": {shape: of one product}, "counts": {shape: in
    a step}, "seconds_per_step", "rate" (operations a second, all of them together),
    "square_rate" (of a 1024 x 1024 product)}.

    products: a Counter of `Product`. window: seconds of each of several windows.
    """
    seconds = {
        str(product): product_seconds(product, dtype, device, window)
        for product in products
    }
    square = Product(1, _SQUARE, _SQUARE, _SQUARE)
    found = {
        "seconds": seconds,
        "counts": {str(product): count for product, count in products.items()},
        "operations": sum(
            product.operations * count for product, count in products.items()
        ),
        "square_rate": square.operations
        / product_seconds(square, dtype, device, window),
    }
    return summed(found)


def summed(found: dict) -> dict:
    """`matmul`'s figures with the sums that follow from its `seconds`."""
    total = sum(
        found["counts"][shape] * seconds
        for shape, seconds in found["seconds"].items()
    )
    return found | {
        "seconds_per_step": total,
        "rate": found["operations"] / total if total else math.nan,
    }


def seconds_of(found: dict, products: Counter) -> float:
    """How long a part of the products takes that `matmul` has timed."""
    return sum(
        found["seconds"][str(product)] * count
        for product, count in products.items()
    )


def fastest(measured: list[dict]) -> dict:
    """Several measurements of the same products as one: the least time of each."""
    first = measured[0]
    seconds = {
        shape: min(found["seconds"][shape] for found in measured)
        for shape in first["seconds"]
    }
    return summed(
        first
        | {
            "seconds": seconds,
            "square_rate": max(found["square_rate"] for found in measured),
        }
    )


def product_seconds(
    product: Product, dtype: torch.dtype, device: torch.device, window: float
) -> float:
    """The least time of a product over several windows."""
    left, right, out = product.operands(dtype, device)
    return best_seconds(
        lambda: torch.matmul(left, right, out=out), device, window
    )


def memory(
    device: torch.device,
    row_bytes: int,
    size: int = 2**28,
    rows: int = 2**20,
    window: float = 0.1,
) -> dict[str, float]:
    """Bytes a second, read and written: {"copy", "add" (two read, one written), "gather" (of
    rows of `row_bytes` at random from a table of so many `rows`)}. size: bytes of a tensor of
    the first two, more than caches hold.
    """
    one, other, out = (torch.ones(size // 4, device=device) for _ in range(3))
    copy = best_seconds(lambda: out.copy_(one), device, window)
    add = best_seconds(
        lambda: torch.add(one, other, alpha=2, out=out), device, window
    )
    table = torch.ones(rows, row_bytes // 4, device=device)
    index = torch.randint(rows, (rows // 16,), device=device)
    gathered = torch.empty(len(index), table.shape[1], device=device)
    gather = best_seconds(
        lambda: torch.index_select(table, 0, index, out=gathered),
        device,
        window,
    )
    return {
        "copy": 2 * size / copy,
        "add": 3 * size / add,
        "gather": 2 * gathered.nbytes / gather,
    }


def collectives(
    ranks: "Ranks", window: float = 0.1, size: int = 2**26
) -> dict[str, float]:
    """Bytes that a rank sends a second in collectives of `size` bytes a rank, {"all_reduce",
    "all_to_all"}, and {"latency"}, the seconds of one of a single number. Called on all
    ranks.
    """
    world = ranks.world_size
    device = ranks.device
    values = torch.zeros(size // 4 // world * world, device=device)
    received = torch.empty_like(values)
    little = torch.zeros(1, device=device)

    def seconds(function):
        dist.barrier()
        # As often on every rank, whatever its clock says.
        count = torch.tensor(
            [max(1, math.ceil(window / _seconds(function, 1, device)))]
        )
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        best = torch.tensor(
            [
                min(
                    _seconds(function, int(count), device)
                    for _ in range(_WINDOWS)
                )
            ],
            dtype=torch.float64,
        )
        dist.all_reduce(best, op=dist.ReduceOp.MAX)
        return float(best)

    others = (world - 1) / world
    return {
        "all_reduce": 2
        * others
        * values.nbytes
        / seconds(lambda: dist.all_reduce(values)),
        "all_to_all": others
        * values.nbytes
        / seconds(lambda: dist.all_to_all_single(received, values)),
        "latency": seconds(lambda: dist.all_reduce(little)),
    }


def best_seconds(
    function: Callable[[], Any], device: torch.device, window: float
) -> float:
    """The least time of a call of `function()` over several windows, each of about `window`
    seconds.
    """
    _seconds(function, 2, device)
    count = math.ceil(window / _seconds(function, 2, device))
    return min(_seconds(function, count, device) for _ in range(_WINDOWS))


def _seconds(function, count, device):
    """Of a call, on average over `count`."""
    begin = time.perf_counter()
    for _ in range(count):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count
