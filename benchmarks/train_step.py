"""How fast is a training step, and what does a large item table cost? Ours beside the same model padded, with dense Adam.

    python benchmarks/train_step.py                                   10⁵, 10⁶ and 10⁷ items: some minutes, 7 GB of memory
    python benchmarks/train_step.py --short                           10⁵ items, few steps
    python benchmarks/train_step.py --loss sampled_softmax --shared 1024

D = 5 domains, r = 128, T = 128, K = 5 experts (j = 3), 32 users a step with lengths even over 16 … 128, fp32, dropout 0.1.
Ours is `trainer.step.Trainer.train_step`: TorchRec table with fused row-wise Adagrad, packed model, DeepSpeed engine. Batches
are built beforehand, as worker processes do. Each line of the table is measured in a process of its own, so that none
inherits another's memory, and each process measures the rate of matrix products too; the best of all is the machine's.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops, machine
from benchmarks.options import positive
from benchmarks.padded import PaddedSyNCRec, pad_batch
from benchmarks.workload import dataset_of, draw
from syncrec.batch import build_batch, move
from syncrec.config import ModelConfig
from trainer import distributed
from trainer.config import RunConfig
from trainer.data.negatives import NegativesConfig
from trainer.data.stream import Plan
from trainer.step import Trainer

DOMAINS, SHORTEST = 5, 16
OURS, PADDED = "ours", "padded"
# The padded version's tensors as large as the item matrix: itself, its gradient, Adam's two moments, and two more for a
# while: gradients of several look-ups that wait to be summed, then what Adam's update of a tensor makes on the way.
_DENSE_COPIES, _PASSING_COPIES = 4, 2


@dataclass(frozen=True)
class Setting:
    """One line of the table: a system and a number of items, and how it is measured."""

    system: str
    items: int
    steps: int
    warmup: int
    users: int
    window: float  # seconds of a window in which the rate of matrix products is taken
    model: ModelConfig
    negatives: NegativesConfig


def main():
    """Measures, prints, writes."""
    options = parse()
    console = Console()
    settings, not_run = plan(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine.describe(device)
    results, failed = [], False
    for setting in settings:
        begin = time.perf_counter()
        try:
            result = in_own_process(setting)
        except BrokenProcessPool:
            reason = "its process was killed, most likely for want of memory"
            not_run.append({"system": setting.system, "items": setting.items, "reason": reason})
            failed = True
            continue
        results.append(result)
        speed = f"{result['tokens_per_second']:,.0f} tokens/s"
        console.print(f"{setting.system}, {setting.items:,} items: {speed} ({time.perf_counter() - begin:.0f} s)")
    record = assemble(options, facts, results, not_run)
    show(console, record)
    if options.json:
        partial = options.json.with_name(options.json.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.json)
        console.print(f"written: {options.json}")
    sys.exit(failed)


def parse(arguments=None):
    """The command line; `--short` and the loss settle what was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=positive, nargs="+", help="numbers of items (100000 1000000 10000000)")
    parser.add_argument("--steps", type=positive, help="steps that are timed (10)")
    parser.add_argument("--warmup", type=positive, help="steps before them (3)")
    parser.add_argument("--loss", default="bpr", choices=["bpr", "bpr_probability", "bce", "sampled_softmax"])
    parser.add_argument("--shared", type=positive, help="negatives that a domain's targets share (else one each)")
    parser.add_argument("--json", type=Path, help="the file (train_step.json beside this script, with --short none)")
    parser.add_argument("--short", action="store_true", help="100000 items, 3 steps after 1")
    options = parser.parse_args(arguments)
    options.items = options.items or ([10**5] if options.short else [10**5, 10**6, 10**7])
    if min(options.items) < 2 * DOMAINS:
        parser.error(f"--items {min(options.items)}: give at least {2 * DOMAINS}, two in each domain")
    options.steps = options.steps or (3 if options.short else 10)
    options.warmup = options.warmup or (1 if options.short else 3)
    if options.json is None and not options.short:
        options.json = Path(__file__).with_suffix(".json")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    return options


def plan(options):
    """The settings to measure, and what is left out with the arithmetic of why."""
    model = ModelConfig(
        dim=128, max_length=128, experts=5, cross_experts=3, blocks=2, heads=1, ffn_dim=128, dropout=0.1, loss=options.loss
    )
    negatives = NegativesConfig(shared=options.shared or 0)
    window = 0.1 if options.short else 0.5
    settings, not_run = [], []
    for system in (OURS, PADDED):
        for items in sorted(set(options.items)):
            if system == PADDED and (reason := too_large(items, model.dim, machine.memory_bytes())):
                not_run.append({"system": system, "items": items, "reason": reason})
            else:
                settings.append(Setting(system, items, options.steps, options.warmup, 32, window, model, negatives))
    return settings, not_run


def too_large(items, dim, memory):
    """Why the padded version cannot train so many items in `memory` bytes, or None where it can."""
    one = items * dim * 4
    kept, peak = _DENSE_COPIES * one, (_DENSE_COPIES + _PASSING_COPIES) * one
    if peak <= memory:
        return None
    return (
        f"{items:.0e} x {dim} x 4 bytes = {one / 1e9:.1f} GB; weights, gradient and Adam's two moments: {kept / 1e9:.1f} GB; "
        f"with {_PASSING_COPIES} more of that size while gradients are summed and weights updated: {peak / 1e9:.1f} GB, and "
        f"the machine has {memory / 1e9:.1f} GB"
    )


def in_own_process(setting):
    """`measure` in a new process; raises BrokenProcessPool where that is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, setting).result()


def measure(setting):
    """Times the steps of one setting: a line of the JSON's `results`. Starts the process group of its process."""
    with distributed.joined() as ranks:
        return _measure(setting, ranks)


def _measure(setting, ranks):
    users, longest = setting.users, setting.model.max_length
    count = setting.warmup + setting.steps
    dataset = dataset_of(setting.items, DOMAINS, users, count)
    drawn = [draw(dataset, step, users, SHORTEST, longest, setting.negatives) for step in range(count)]
    domain_items = [domain.items for domain in dataset.domains]
    build, work, start = _SYSTEMS[setting.system]
    batches = [build(*arrays, domain_items, longest) for arrays in drawn]
    tokens = len(drawn[0][0])
    rates = machine.matmul_rates(setting.model.experts, tokens, setting.model.dim, ranks.device, setting.window)
    step = start(setting, ranks, dataset)
    seconds, losses = [], []
    for batch in batches:
        begin = time.perf_counter()
        losses.append(float(step(batch)))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"{setting.system}, {setting.items} items: the losses are {losses}")
    timed = seconds[setting.warmup :]
    median = statistics.median(timed)
    operations = statistics.mean(
        flops.step_operations(setting.model, work(setting.model, batch)) for batch in batches[setting.warmup :]
    )
    return {
        "system": setting.system,
        "items": setting.items,
        "tokens": tokens,
        "users": users,
        "threads": torch.get_num_threads(),
        "step_seconds": {"median": median, "min": min(timed), "max": max(timed), "all": timed},
        "warmup_seconds": seconds[: setting.warmup],
        "tokens_per_second": tokens / median,
        "users_per_second": users / median,
        "operations_per_step": operations,
        "operations_per_second": operations / median,
        "matmul_rates": rates,
        "losses": losses,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # kibibytes on Linux
    }


def start_ours(setting, ranks, dataset):
    """The trainer's own step."""
    config = RunConfig(global_batch_size=setting.users, model=setting.model, negatives=setting.negatives)
    trainer = Trainer(config, ranks, dataset, Plan(dataset, setting.users, ranks.world_size, config.seed))

    def step(batch):
        loss, _ = trainer.train_step(batch)
        return loss

    return step


def start_padded(setting, ranks, dataset):
    """One optimizer over everything, as a tutorial has it."""
    torch.manual_seed(0)
    model = PaddedSyNCRec(setting.model, len(dataset.domains), dataset.num_embeddings).to(ranks.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss, _ = model(move(batch, ranks.device))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# How each system builds a batch, counts its work, and starts.
_SYSTEMS = {
    OURS: (build_batch, flops.packed_work, start_ours),
    PADDED: (pad_batch, flops.padded_work, start_padded),
}


def assemble(options, facts, results, not_run):
    """The JSON: every figure with what it was measured on."""
    rates = {}
    for result in results:
        for shape, rate in result.pop("matmul_rates").items():
            rates[shape] = max(rate, rates.get(shape, 0.0))
    best = max(rates.values(), default=math.nan)
    for result in results:
        result["matmul_share"] = result["operations_per_second"] / best
    given = {name: getattr(options, name) for name in ("items", "steps", "warmup", "loss", "shared", "short")}
    return {
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]),
        "settings": {**given, "domains": DOMAINS, "lengths": f"even over {SHORTEST} … T"},
        "machine": facts,
        "matmul_rates": rates,
        "matmul_rate": best,
        "results": results,
        "not_run": not_run,
    }


def show(console, record):
    """The table, and below it what it was measured on."""
    title = "A step of 32 users: D=5, r=128, T=128, K=5 (j=3), fp32. padded: dense Adam"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("system", no_wrap=True)
    for name in ("items", "tokens/s", "users/s", "step s", "min - max", "matmul", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in record["results"]:
        seconds = result["step_seconds"]
        table.add_row(
            result["system"],
            f"{result['items']:,}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['users_per_second']:,.1f}",
            f"{seconds['median']:.3f}",
            f"{seconds['min']:.3f}-{seconds['max']:.3f}",
            f"{result['matmul_share']:.0%}",
            f"{result['peak_memory_bytes'] / 1e9:.1f} GB",
        )
    for left_out in record["not_run"]:
        table.add_row(left_out["system"], f"{left_out['items']:,}", "not run", *[""] * 5)
    console.print(table)
    for left_out in record["not_run"]:
        console.print(f"{left_out['system']}, {left_out['items']:,} items, not run: {left_out['reason']}", soft_wrap=True)
    facts, rate = record["machine"], record["matmul_rate"]
    console.print(f"matmul: share of {rate / 1e9:.0f} GFLOP/s in fp32 products; {facts['processor']}, {facts['cores']} cores")
    if facts["load_before"] > 0.5:
        console.print(f"The load was {facts['load_before']:.1f} before the run: on a quiet machine the figures are others.")


if __name__ == "__main__":
    main()
