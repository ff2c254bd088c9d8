"""What the hardware could do, measured in the same run as what is held against it.

- `matmul`: the time of a step's matrix products at the model's own shapes, and the rate at which a large square one runs.
- `memory`: bytes a second of a copy, of an addition, and of rows gathered at random, the natural limit of the item table.
- `loopback`: bytes a second of collectives between processes of this machine (gloo), and the time of one with hardly any bytes.

The best of several windows counts: a limit is what the hardware can do, and other processes only slow it down.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from benchmarks import suite
from trainer import distributed

_WINDOWS = 5
_SQUARE = 1024
_COLLECTIVE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Product:
    """`experts` products (rows, inner) @ (inner, columns) side by side. flipped: "left" or "right" where that operand is a
    transposed view, as autograd has it in the products of backward; "" for none."""

    experts: int
    rows: int
    inner: int
    columns: int
    flipped: str = ""

    @property
    def operations(self):
        """A multiply-add counts as two."""
        return 2 * self.experts * self.rows * self.inner * self.columns

    def __str__(self):
        left, right = (f"({rows}, {columns})" for rows, columns in ((self.rows, self.inner), (self.inner, self.columns)))
        marks = "ᵀ" * (self.flipped == "left"), "ᵀ" * (self.flipped == "right")
        return f"{self.experts} x {left}{marks[0]} @ {right}{marks[1]}"

    def operands(self, dtype, device):
        """Left, right and the result's place."""

        def drawn(rows, columns, flipped):
            shape = (self.experts, columns, rows) if flipped else (self.experts, rows, columns)
            values = torch.randn(shape, device=device).to(dtype)
            return values.transpose(1, 2) if flipped else values

        left, right = (
            drawn(self.rows, self.inner, self.flipped == "left"),
            drawn(self.inner, self.columns, self.flipped == "right"),
        )
        out = torch.empty(self.experts, self.rows, self.columns, dtype=dtype, device=device)
        # One expert is a plain product, as a linear layer computes it.
        return tuple(tensor[0] for tensor in (left, right, out)) if self.experts == 1 else (left, right, out)


def expert_products(config, tokens, experts, backward):
    """The products of a stack of experts on a view of so many tokens: a Counter of `Product`. Attention's own are left out."""
    found = Counter()
    for inner, columns in (
        (config.dim, 3 * config.dim),
        (config.dim, config.dim),
        (config.dim, config.ffn_dim),
        (config.ffn_dim, config.dim),
    ):
        found += _layer(experts, tokens, inner, columns, backward, config.blocks)
    return found


def task_products(config, tokens, gate=True):
    """The products of a gate and a tower on so many tokens, forward and backward."""
    found = _layer(1, tokens, config.dim, config.ffn_dim, True) + _layer(1, tokens, config.ffn_dim, config.dim, True)
    return found + (_layer(1, tokens, config.dim, config.experts, True) if gate else Counter())


def step_products(config, batch):
    """All products of a step of the packed model but those of attention and scores: experts, gates, towers.

    Each view runs all experts forward, and those that learn from it backward (equations 2 and 4).
    """
    found = Counter()
    cross, single = config.cross_experts, config.experts - config.cross_experts
    for view, live, stopped in ((batch.cross, cross, single), (batch.single, single, cross)):
        tokens = len(view.input_M)
        found += expert_products(config, tokens, live, True) + expert_products(config, tokens, stopped, False)
        for begin, end in pairwise(view.task_starts):
            found += task_products(config, end - begin)
    return found


def _layer(experts, tokens, inner, columns, backward, times=1):
    products = [Product(experts, tokens, inner, columns)]
    if backward:  # gradients of the input: grad @ Wᵀ, and of the weights: Xᵀ @ grad
        products += [Product(experts, tokens, columns, inner, "right"), Product(experts, inner, tokens, columns, "left")]
    return Counter({product: products.count(product) * times for product in products if tokens})


def matmul(products, dtype, device, window=0.1):
    """How fast the device multiplies: {"seconds": {shape: of one product}, "counts": {shape: in a step}, "seconds_per_step",
    "rate" (operations a second, all of them together), "square_rate" (of a 1024 x 1024 product)}.

    products: a Counter of `Product`. window: seconds of each of several windows.
    """
    seconds = {str(product): _product_seconds(product, dtype, device, window) for product in products}
    square = Product(1, _SQUARE, _SQUARE, _SQUARE)
    found = {
        "seconds": seconds,
        "counts": {str(product): count for product, count in products.items()},
        "operations": sum(product.operations * count for product, count in products.items()),
        "square_rate": square.operations / _product_seconds(square, dtype, device, window),
    }
    return summed(found)


def summed(found):
    """`matmul`'s figures with the sums that follow from its `seconds`."""
    total = sum(found["counts"][shape] * seconds for shape, seconds in found["seconds"].items())
    return found | {"seconds_per_step": total, "rate": found["operations"] / total if total else math.nan}


def fastest(measured):
    """Several measurements of the same products as one: the least time of each."""
    first = measured[0]
    seconds = {shape: min(found["seconds"][shape] for found in measured) for shape in first["seconds"]}
    return summed(first | {"seconds": seconds, "square_rate": max(found["square_rate"] for found in measured)})


def _product_seconds(product, dtype, device, window):
    left, right, out = product.operands(dtype, device)
    return best_seconds(lambda: torch.matmul(left, right, out=out), device, window)


def memory(device, row_bytes, size=2**28, rows=2**20, window=0.1):
    """Bytes a second, read and written: {"copy", "add" (two read, one written), "gather" (of rows of `row_bytes` at random from
    a table of so many `rows`)}. size: bytes of a tensor of the first two, more than caches hold."""
    one, other, out = (torch.ones(size // 4, device=device) for _ in range(3))
    copy = best_seconds(lambda: out.copy_(one), device, window)
    add = best_seconds(lambda: torch.add(one, other, alpha=2, out=out), device, window)
    table = torch.ones(rows, row_bytes // 4, device=device)
    index = torch.randint(rows, (rows // 16,), device=device)
    gathered = torch.empty(len(index), table.shape[1], device=device)
    gather = best_seconds(lambda: torch.index_select(table, 0, index, out=gathered), device, window)
    return {"copy": 2 * size / copy, "add": 3 * size / add, "gather": 2 * gathered.nbytes / gather}


def loopback(ranks=2, window=0.3):
    """Collectives between so many processes of this machine: bytes that a rank sends a second, {"all_reduce", "all_to_all"}, of
    64 MiB a rank, and {"latency"}, the seconds of an all-reduce of one number. Starts the processes."""
    return suite.on_ranks(ranks, measure_loopback, window)


def measure_loopback(window):
    """`loopback` on one of its ranks."""
    with distributed.joined() as ranks:
        return collectives(ranks, window)


def collectives(ranks, window):
    """`loopback` in the group that this process is in. Called on all ranks."""
    world, device = ranks.world_size, ranks.device
    values = torch.ones(_COLLECTIVE_BYTES // 4 // world * world, device=device)
    received, little = torch.empty_like(values), torch.ones(1, device=device)

    def together(function, sent):
        def several(count):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(count):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - begin) / count

        # As often on every rank, whatever its clock says.
        count = torch.tensor([max(1, int(window / several(1)))])
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        best = torch.tensor([min(several(int(count)) for _ in range(_WINDOWS))], dtype=torch.float64)
        dist.all_reduce(best, op=dist.ReduceOp.MAX)
        return sent / float(best)

    others = (world - 1) / world
    return {
        "all_reduce": together(lambda: dist.all_reduce(values.mul_(1 / world)), 2 * others * values.nbytes),
        "all_to_all": together(lambda: dist.all_to_all_single(received, values), others * values.nbytes),
        "latency": 1 / together(lambda: dist.all_reduce(little.fill_(1)), 1),
    }


def best_seconds(function, device, window):
    """The least time of a call of `function()` over several windows, each of at least `window` seconds."""

    def several(count):
        begin = time.perf_counter()
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    several(2)
    count = max(1, math.ceil(window / several(2)))
    return min(several(count) for _ in range(_WINDOWS))
