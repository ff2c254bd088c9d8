"""What is this machine, what can it do, and does each part of the stack answer on it?

    python benchmarks/environment.py            what a figure of this machine is to be held against
    python benchmarks/environment.py --short    small sizes

Each probe stands alone: one that fails says why, the others go on, and the exit status is then 1.

- devices, versions: what `nvidia-smi` and PyTorch say. Without a GPU: of the processor.
- memory: bytes a second of a copy, of an addition and of rows at random (`limits.py`).
- products: operations a second of a large square product, in fp32, TF32 and bf16.
- transfers: bytes a second between host and device, from pinned memory and from other.
- launches: kernels that the host queues in a second, one after the other.
- collectives: whether the process group of one rank answers, and with several GPUs their rates.
- attention: for which widths attention goes to one kernel for sequences of many lengths.
- table: whether each optimizer of the item table updates its rows, by placement.
"""

import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits, machine, suite
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from syncrec.layers import varlen
from trainer.distributed import process_group

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

_SMI = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,"
    "power.limit,pcie.link.gen.current,pcie.link.width.current"
)
_LAUNCHES = 2000
_OPTIMIZERS = (
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "adam",
    "partial_rowwise_adam",
)


@dataclass(frozen=True)
class Settings:
    """settings/environment.yaml."""

    memory_bytes: int
    rows: int
    row_floats: int
    square: int
    transfer_bytes: int
    wire_bytes: int
    window: float
    widths: list[int]
    heads: list[int]
    table_rows: int

    def __post_init__(self) -> None:
        suite.at_least(1, self, "memory_bytes", "rows", "square", "heads")
        suite.at_least(1, self, "transfer_bytes", "wire_bytes", "widths")
        suite.at_least(4, self, "row_floats", "table_rows")


def main() -> None:
    """Probes, prints, writes."""
    settings, options = suite.settings("environment", Settings)
    record = suite.header("environment", settings, options)
    results = suite.in_own_process(probe_all, settings)
    if torch.cuda.device_count() > 1:
        results.append(
            probe("collectives of all devices", probe_devices, settings)
        )
    suite.save("environment", record | {"results": results}, options)
    sys.exit(any("error" in result for result in results))


def probe_all(settings: Settings) -> list[dict[str, Any]]:
    """What each probe of one process gives: the record's `results`."""
    probes = {
        "devices": probe_machine,
        "versions": probe_versions,
        "memory": probe_memory,
        "products": probe_products,
        "transfers": probe_transfers,
        "launches": probe_launches,
        "collectives": probe_collectives,
        "attention": probe_attention,
    }
    with process_group.join_process_group() as ranks:
        results = []
        for name, function in probes.items():
            results.append(probe(name, function, settings, ranks))
        for optimizer, placement in table_kinds(ranks.device):
            results.append(
                probe(
                    f"table: {optimizer}, {placement}",
                    probe_table,
                    settings,
                    ranks,
                    optimizer,
                    placement,
                )
            )
        return results


def probe(
    name: str, function: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """What a probe finds, or why it failed, and its seconds."""
    begin = time.perf_counter()
    try:
        result: dict[str, Any] = {"probe": name, "found": function(*arguments)}
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        result = {"probe": name, "error": text[:1000]}
    return result | {"seconds": time.perf_counter() - begin}


def probe_machine(settings: Settings, ranks: "Ranks") -> dict[str, Any]:
    """The devices by `nvidia-smi`, how they are joined, and the host."""
    shared = Path("/dev/shm")
    found: dict[str, Any] = {
        "computes on": str(ranks.device),
        "compiler": shutil.which("c++") is not None,
        "shared memory bytes": shutil.disk_usage(shared).total
        if shared.is_dir()
        else None,
    }
    if shutil.which("nvidia-smi"):
        query = [f"--query-gpu={_SMI}", "--format=csv,noheader"]
        found["nvidia-smi"] = _answer("nvidia-smi", *query)
        found["topology"] = _answer("nvidia-smi", "topo", "-m")
    if ranks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ranks.device)
        capability = torch.cuda.get_device_capability(ranks.device)
        found |= {
            "devices": torch.cuda.device_count(),
            "free bytes": free,
            "total bytes": total,
            "compute capability": ".".join(map(str, capability)),
        }
    return found


def _answer(*command: str) -> list[str]:
    """The lines that a command prints, its errors among them."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False
    )
    return (done.stdout + done.stderr).strip().splitlines()


def probe_versions(settings: Settings, ranks: "Ranks") -> dict[str, Any]:
    """What PyTorch is built for, and the libraries that it has loaded."""
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    if ranks.device.type == "cuda":
        nccl = torch.cuda.nccl.version()
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, nccl)),
            "architectures": torch.cuda.get_arch_list(),
        }
    return found


def probe_memory(settings: Settings, ranks: "Ranks") -> dict[str, float]:
    """Bytes a second."""
    return limits.memory(
        ranks.device,
        4 * settings.row_floats,
        settings.memory_bytes,
        settings.rows,
        settings.window,
    )


def probe_products(settings: Settings, ranks: "Ranks") -> dict[str, float]:
    """Operations a second by precision."""
    kinds = {"fp32": (torch.float32, False)}
    if ranks.device.type == "cuda":
        kinds["tf32"] = (torch.float32, True)
    if machine.has_bf16(ranks.device):
        kinds["bf16"] = (torch.bfloat16, False)
    square = limits.Product(
        1, settings.square, settings.square, settings.square
    )
    before = torch.backends.cuda.matmul.allow_tf32
    found = {}
    try:
        for name, (dtype, tf32) in kinds.items():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            seconds = limits.product_seconds(
                square, dtype, ranks.device, settings.window
            )
            found[name] = square.operations / seconds
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


def probe_transfers(settings: Settings, ranks: "Ranks") -> dict[str, float]:
    """Bytes a second between host and device; nothing where there is but the host."""
    if ranks.device.type != "cuda":
        return {}
    pageable = torch.zeros(settings.transfer_bytes, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    on_device = torch.empty_like(pageable, device=ranks.device)
    copies = {
        "pinned to device": (on_device, pinned),
        "pageable to device": (on_device, pageable),
        "device to pinned": (pinned, on_device),
    }
    found = {}
    for name, (target, source) in copies.items():

        def copy(target: Any = target, source: Any = source) -> None:
            target.copy_(source, non_blocking=True)

        seconds = limits.best_seconds(copy, ranks.device, settings.window)
        found[name] = settings.transfer_bytes / seconds
    return found


def probe_launches(settings: Settings, ranks: "Ranks") -> dict[str, float]:
    """How many kernels the host queues in a second, and how many the device then has done."""
    number = torch.zeros(1, device=ranks.device)

    def wait() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)

    number.add_(1)
    wait()
    begin = time.perf_counter()
    for _ in range(_LAUNCHES):
        number.add_(1)
    queued = time.perf_counter() - begin
    wait()
    done = time.perf_counter() - begin
    return {"queued a second": _LAUNCHES / queued, "done": _LAUNCHES / done}


def probe_collectives(settings: Settings, ranks: "Ranks") -> dict[str, Any]:
    """Sums and exchanges of a group of one, on the device and on the host."""
    value = torch.arange(8.0, device=ranks.device)
    received = torch.empty_like(value)
    dist.all_reduce(value)
    dist.all_to_all_single(received, value)
    dist.barrier()
    if not torch.equal(received.cpu(), torch.arange(8.0)):
        raise ArithmeticError(f"a group of one gives {received.tolist()}")
    on_host = torch.ones(3)
    dist.all_reduce(on_host)
    return {"backend": dist.get_backend(), "latency": _latency(ranks)}


def _latency(ranks: "Ranks") -> float:
    """Seconds of a sum of one number."""
    number = torch.zeros(1, device=ranks.device)
    return limits.best_seconds(
        lambda: dist.all_reduce(number), ranks.device, 0.02
    )


def probe_devices(settings: Settings) -> dict[str, float]:
    """Rates of collectives over all of this machine's devices, a rank each."""
    return suite.on_ranks(
        torch.cuda.device_count(), _measure_collectives, settings
    )


def _measure_collectives(settings: Settings) -> dict[str, float]:
    with process_group.join_process_group() as ranks:
        return limits.collectives(ranks, settings.window, settings.wire_bytes)


def probe_attention(settings: Settings, ranks: "Ranks") -> dict[str, bool]:
    """By width and heads: whether one kernel takes sequences of many lengths; it is run once."""
    starts = torch.tensor([0, 5, 5, 40, 64], device=ranks.device)
    found = {}
    for width in settings.widths:
        for heads in settings.heads:
            takes = width % heads == 0 and varlen.available(
                ranks.device, torch.bfloat16, width // heads
            )
            found[f"r = {width}, {heads} heads"] = takes
            if takes:
                _attend(starts, width, heads)
    return found


def _attend(starts: torch.Tensor, width: int, heads: int) -> None:
    """Attention and its gradient, which have to be finite."""
    tokens = int(starts[-1])
    qkv_MR = torch.randn(tokens, 3 * width, device=starts.device).bfloat16()
    qkv_MR.requires_grad_()
    longest = int(starts.diff().max())
    mixed_MR = varlen._attend(qkv_MR, starts, longest, heads)
    mixed_MR.float().sum().backward()
    gradient = qkv_MR.grad
    if gradient is None or not gradient.isfinite().all():
        raise ArithmeticError(f"r = {width}, {heads} heads: not finite")


def table_kinds(device: torch.device) -> list[tuple[str, str]]:
    """Optimizers and placements that the device has; FBGEMM has no Adam on a CPU."""
    if device.type == "cuda":
        placements = ("device", "cached")
        return [(name, place) for name in _OPTIMIZERS for place in placements]
    return [(name, "auto") for name in _OPTIMIZERS if "adam" not in name]


def probe_table(
    settings: Settings, ranks: "Ranks", optimizer: str, placement: str
) -> dict[str, float]:
    """Three updates of some rows, one of them a thousand times in a look-up."""
    config = TableConfig(optimizer=optimizer, placement=placement)  # type: ignore[arg-type]
    table = ItemTable(
        settings.table_rows, settings.row_floats, config, 0, ranks.device
    )
    often = torch.full((1000,), settings.table_rows - 1)
    generator = torch.Generator().manual_seed(0)
    before = table(often[:1].to(ranks.device)).detach().clone()
    for _ in range(3):
        some = torch.randint(settings.table_rows, (1000,), generator=generator)
        rows = table(torch.cat([some, often]).to(ranks.device))
        table.update(torch.full_like(rows, 0.01))
    after = table(often[:1].to(ranks.device)).detach()
    weight = table.shard()[1]["weight"]
    moved = float((after - before).abs().max())
    if not weight.isfinite().all() or not moved:
        raise ArithmeticError(f"a row has moved by {moved}")
    return {"a row has moved by": moved}


def table(record: dict[str, Any]) -> str:
    """A line for each probe."""
    rows = []
    for result in record["results"]:
        finding = f"FAILED: {result['error']}" if "error" in result else ""
        for key, value in result.get("found", {}).items():
            finding += f"{'; ' if finding else ''}{key} {shown(value)}"
        rows.append(
            {
                "probe": result["probe"],
                "found": finding.replace("|", "/"),
                "s": f"{result['seconds']:.1f}",
            }
        )
    return suite.markdown(rows)


def shown(value: Any) -> str:
    """A finding as a table has it: rates with their power of ten, lists by semicolons."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(" ".join(str(line).split()) for line in value)
    if isinstance(value, (int, float)) and abs(value) >= 10_000:
        for power, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= power:
                return f"{value / power:.4g} {name}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
