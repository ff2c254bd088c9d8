"""What does a device do in a training step, and what does its host: kernels, launches, waits?

    python benchmarks/step_profile.py users=1024 precision=bf16
    python benchmarks/step_profile.py trace=FOLDER/steps.json.gz     the trace itself, too
    python benchmarks/step_profile.py --short

The steps are those of `train_step.py`, with the next batch made ready beside each, under PyTorch's
profiler. Steps are slower under it, so the time of a step comes from as many steps before it.

- busy: the time in which the device has a kernel, a copy or a fill; several at once count once.
- idle: the share of the time from the device's first work to its last in which it is not busy.
- launches: calls by which the host asks for kernels; waits: calls in which it waits for the device.
- queued: the host's time until it has asked for all of a step's work.

Without a device the operators of the host are all there is.
"""

import gzip
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite, train_step
from benchmarks.workload import dataset_of
from embeddings.config import TableConfig
from syncrec.batch.build import build_batch
from syncrec.config import ModelConfig
from trainer.config.negatives import NegativesConfig
from trainer.distributed import process_group

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

_KERNEL = "kernel"
_WORK = (_KERNEL, "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_SHOWN = 30  # kernels and operators
_LONGEST_NAME = 100
# What a kernel belongs to, by what is in its name: the first that fits.
_KINDS = {
    "table": ("embedding", "bucketize", "linearize", "lxu", "bounds_check"),
    "sort, scan, unique": ("cub::", "radix", "Radix", "DeviceScan"),
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "splitK"),
    "dense optimizer": ("Adam", "multi_tensor_apply"),
    "collectives": ("nccl",),
    "softmax": ("softmax", "Softmax"),
    "norm": ("layer_norm", "LayerNorm", "norm_kernel"),
    "index": ("index", "scatter", "gather"),
    "reduce": ("reduce_kernel", "Reduce"),
    "copy": ("Memcpy", "Memset", "copy_kernel", "CatArray"),
    "element by element": ("elementwise", "vectorized"),
}
_OTHER = "other"


@dataclass(frozen=True)
class Settings:
    """settings/step_profile.yaml. trace: the file that gets the trace; "": it is thrown away."""

    precision: Literal["fp32", "bf16"]
    items: int
    domains: int
    users: int
    shortest: int
    steps: int
    warmup: int
    exponent: float
    trace: str
    model: ModelConfig
    negatives: NegativesConfig
    table: TableConfig

    def __post_init__(self) -> None:
        suite.at_least(1, self, "domains", "users", "shortest", "steps")
        suite.at_least(1, self, "warmup")
        suite.at_least(2 * self.domains, self, "items")


def main() -> None:
    """Profiles, prints, writes."""
    settings, options = suite.settings("step_profile", Settings)
    record = suite.header("step_profile", settings, options)
    result = suite.in_own_process(measure, settings)
    suite.save("step_profile", record | {"result": result}, options)


def measure(settings: Settings) -> dict[str, Any]:
    """The record's `result`. Starts the process group of its process."""
    with process_group.join_process_group() as ranks:
        return _measure(settings, ranks)


def _measure(settings: Settings, ranks: "Ranks") -> dict[str, Any]:
    config = replace(settings.model, precision=settings.precision)
    count = settings.warmup + 2 * settings.steps + 1
    dataset = dataset_of(
        settings.items, settings.domains, settings.users, count
    )
    drawn, batches = train_step.batches_of(
        build_batch, dataset, settings, config.max_length, ranks.device
    )
    start = train_step.start_ours(config, settings, ranks, dataset)
    steps = iter(start(batches))
    for _ in range(settings.warmup):
        next(steps)
    _wait(ranks.device)
    begin = time.perf_counter()
    for _ in range(settings.steps):
        next(steps)
    queued = time.perf_counter() - begin
    _wait(ranks.device)
    whole = time.perf_counter() - begin
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in steps:
            pass
        _wait(ranks.device)
    events = _trace(profiler, settings.trace)
    return {
        "tokens": len(drawn[0][0]),
        "steps": settings.steps,
        "step_seconds": whole / settings.steps,
        "queued_seconds": queued / settings.steps,
        "device": summarize(events, settings.steps),
        "operators": operators(profiler.key_averages(), settings.steps),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trace(profiler: profile, file: str) -> list[dict[str, Any]]:
    """The profiler's events. file: where they go, gzipped; "": nowhere."""
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        if file:
            with open(path, "rb") as plain, gzip.open(file, "wb", 6) as packed:
                shutil.copyfileobj(plain, packed)
        return json.loads(path.read_bytes())["traceEvents"]


def summarize(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What a device did in so many steps, by a trace's events; times in seconds of a step.

    Example: of one step, a kernel from 0 to 10 µs and a copy from 5 to 20 µs:

        busy_seconds    2e-05
        kernels         1.0
        copies          1.0
    """
    work = []
    calls = []
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") in _WORK:
            work.append(event)
        elif event.get("cat") in _CALLS:
            calls.append(event)
    kernels = [event for event in work if event["cat"] == _KERNEL]
    launches = [event for event in calls if "Launch" in event["name"]]
    waits = [event for event in calls if "Synchronize" in event["name"]]
    busy, extent = _busy((event["ts"], event["dur"]) for event in work)
    by_name = _summed(((event["name"], event) for event in work), steps)
    by_kind = _summed(
        ((kind_of(event["name"]), event) for event in work), steps
    )
    return {
        "kernels": len(kernels) / steps,
        "copies": (len(work) - len(kernels)) / steps,
        "launches": len(launches) / steps,
        "waits": len(waits) / steps,
        "waited_seconds": sum(event["dur"] for event in waits) / 1e6 / steps,
        "busy_seconds": busy / 1e6 / steps,
        "idle_share": 1 - busy / extent if extent else None,
        "by_name": by_name[:_SHOWN],
        "by_kind": by_kind,
    }


def _busy(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The time that (begin, duration) cover together, and that from the first to the last."""
    busy = 0.0
    first = None
    end = 0.0
    for begin, duration in sorted(spans):
        if first is None:
            first = begin
            end = begin
        busy += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    return busy, 0.0 if first is None else end - first


def _summed(
    named: Iterable[tuple[str, dict[str, Any]]], steps: int
) -> list[dict[str, Any]]:
    """Events by name: how many a step, and their seconds; the longest first."""
    counts: dict[str, int] = {}
    microseconds: dict[str, float] = {}
    for name, event in named:
        counts[name] = counts.get(name, 0) + 1
        microseconds[name] = microseconds.get(name, 0.0) + event["dur"]
    names = sorted(counts, key=lambda name: -microseconds[name])
    return [
        {
            "name": name[: 2 * _LONGEST_NAME],
            "count": counts[name] / steps,
            "seconds": microseconds[name] / 1e6 / steps,
        }
        for name in names
    ]


def kind_of(kernel: str) -> str:
    """What a kernel of this name is part of."""
    for kind, parts in _KINDS.items():
        if any(part in kernel for part in parts):
            return kind
    return _OTHER


def operators(averages: Iterable[Any], steps: int) -> list[dict[str, Any]]:
    """The operators that took most of the host's own time, by step."""
    rows = [
        {
            "name": average.key[: 2 * _LONGEST_NAME],
            "count": average.count / steps,
            "seconds": average.self_cpu_time_total / 1e6 / steps,
        }
        for average in averages
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return rows[:_SHOWN]


def table(record: dict[str, Any]) -> str:
    """Sentences of the whole, then kernels by kind and by name, and the host's operators."""
    result = record["result"]
    device = result["device"]
    step = 1e3 * result["step_seconds"]
    lines = [
        f"{result['tokens']:,} tokens a step; a step takes {step:.2f} ms, the host has queued it "
        f"after {1e3 * result['queued_seconds']:.2f} ms."
    ]
    if device["idle_share"] is None:
        lines.append("No device: nothing is known of kernels.")
    else:
        lines.append(
            f"A step: {device['kernels']:.0f} kernels, {device['copies']:.0f} copies and fills, "
            f"{device['launches']:.0f} launches, {device['waits']:.1f} waits of the host "
            f"({1e3 * device['waited_seconds']:.2f} ms). The device is busy for "
            f"{1e3 * device['busy_seconds']:.2f} ms and idle for {device['idle_share']:.1%} of the "
            "time from its first work to its last."
        )
        lines.append(_named_table("kind of kernel", device["by_kind"]))
        lines.append(_named_table("kernel", device["by_name"]))
    lines.append(
        _named_table("operator, by the host's own time", result["operators"])
    )
    return "\n\n".join(lines)


def _named_table(title: str, rows: list[dict[str, Any]]) -> str:
    """Names, counts and milliseconds of a step."""
    cells = []
    for row in rows:
        name = row["name"].replace("|", "¦")
        cells.append(
            {
                title: name[:_LONGEST_NAME],
                "a step": f"{row['count']:,.1f}",
                "ms a step": f"{1e3 * row['seconds']:.3f}",
            }
        )
    return suite.markdown(cells)


if __name__ == "__main__":
    main()
