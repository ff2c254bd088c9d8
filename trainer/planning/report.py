"""A plan as tables: memory by part, bytes and messages by part, a step's seconds, many ranks; and
what all of it assumes."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from embeddings.placement import format_size
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.planning.machines import (
    COMPARISON_EFFICIENCY,
    EFFICIENCY,
    Machines,
)
from trainer.planning.memory import zero_stage
from trainer.planning.prediction import Plan, overhead_seconds
from trainer.reporting.line_folding import WIDTH_IN_A_PIPE


def print_plan(plan: Plan, config: RunConfig, dataset: Dataset) -> None:
    """Prints the plan on standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_IN_A_PIPE)
    for line in headline(plan, config, dataset):
        console.print(
            line,
            highlight=False,
            markup=False,
        )
    console.print(memory_table(plan))
    if plan.sent:
        console.print(sent_table(plan))
    console.print(step_table(plan))
    console.print(scaled_table(plan))
    console.print(
        "What is assumed:",
        highlight=False,
    )
    for line in assumptions(plan, config):
        console.print(
            f"- {line}",
            highlight=False,
            markup=False,
        )


def headline(plan: Plan, config: RunConfig, dataset: Dataset) -> Iterator[str]:
    """What the plan is for, and what a step brings."""
    machines = plan.machines
    device = "this machine's processor"
    if machines.device is not None:
        device = f"{machines.device.name} each"
    ranks = _count(
        machines.ranks,
        "rank",
    )
    hosts = _count(
        machines.hosts,
        "host",
    )
    rows = _whole(dataset.num_embeddings)
    weights = _whole(plan.trial.weights)
    stage = zero_stage(config)
    yield (
        f"{ranks} on {hosts}, {device}; {rows} rows of {config.model.dim} floats; "
        f"{weights} dense weights, ZeRO stage {stage}"
    )
    load = plan.load
    users = _whole(load.users)
    interactions = _whole(load.interactions)
    tokens = _whole(load.tokens)
    most = _whole(load.most_tokens)
    distinct = _whole(load.rows)
    steps = _whole(load.steps)
    yield (
        f"a step of a rank: {users} users, {interactions} interactions, {tokens} tokens in both "
        f"views (at most {most}), {distinct} rows; {steps} steps an epoch"
    )


def memory_table(plan: Plan) -> Table:
    """Bytes of a rank by part.

     memory of a rank                     host
    ────────────────────────────────────────────
     the process itself                 389.0 MB
     item table, its optimizer            5.4 MB
    """
    has_device = plan.machines.device is not None
    columns = ["device", "host"] if has_device else ["host"]
    table = _make_table(
        "memory of a rank",
        *columns,
    )
    for part in plan.memory.parts:
        if part.device + part.host == 0:
            continue
        cells = [_size(part.device), _size(part.host)]
        table.add_row(
            part.name,
            *cells[-len(columns) :],
        )
    totals = [_size(plan.memory.device), _size(plan.memory.host)]
    table.add_section()
    table.add_row(
        "all, at most",
        *totals[-len(columns) :],
    )
    if not has_device:
        process = _size(plan.memory.process)
        table.add_row(
            "of it in the rank's own process",
            process,
        )
    return table


def sent_table(plan: Plan) -> Table:
    """Bytes and messages that a rank sends in a step by part."""
    table = _make_table(
        "sent in a step",
        "bytes",
        "messages",
    )
    sent_bytes = 0.0
    messages = 0
    for name, sent in plan.sent.items():
        table.add_row(
            name,
            _whole(sent.bytes),
            _whole(sent.messages),
        )
        sent_bytes += sent.bytes
        messages += sent.messages
    table.add_section()
    table.add_row(
        "all",
        _whole(sent_bytes),
        _whole(messages),
    )
    return table


def step_table(plan: Plan) -> Table:
    """Milliseconds of a step by part, and what limits it."""
    table = _make_table(
        "time of a step",
        "ms",
        "share",
    )
    total = plan.step_seconds
    for name, seconds in plan.seconds.items():
        if seconds:
            table.add_row(
                name, f"{1e3 * seconds:.2f}", f"{seconds / total:.0%}"
            )
    table.add_section()
    table.add_row(
        "all, nothing overlapped",
        _milliseconds(total),
        "100%",
    )
    table.add_row(f"most of it: {plan.limit}")
    return table


def scaled_table(plan: Plan) -> Table:
    """A line a number of ranks, each with as many users as in the plan."""
    has_device = plan.machines.device is not None
    memory = "device" if has_device else "process"
    table = _make_table(
        "ranks", "users", "step, ms", "efficiency", "sent", memory, "limit"
    )
    for line in plan.scaled:
        taken = line.memory.process
        if has_device:
            taken = line.memory.device
        fits = format_size(taken)
        if line.memory.refusal:
            fits = "too much"
        ranks = _whole(line.machines.ranks)
        table.add_row(
            f"{ranks} on {line.machines.hosts}",
            _whole(line.users),
            _milliseconds(line.seconds),
            f"{line.efficiency:.0%}",
            format_size(line.sent),
            fits,
            line.limit,
        )
    return table


def assumptions(plan: Plan, config: RunConfig) -> Iterator[str]:
    """What the figures rest on, a sentence each."""
    machines = plan.machines
    yield from _assumed_speed(
        plan,
        machines,
    )
    own = 1e3 * overhead_seconds(
        config,
        machines,
    )
    yield f"{own:g} ms of a step are the program's own (launches, Python)."
    inside = machines.inside_gbyte
    between = machines.between_gbit
    hop = machines.message_microseconds
    yield (
        f"Links: a rank sends {inside:g} GB/s within a host, a host {between:g} Gbit/s to others "
        f"(--between-gbit); a collective takes {hop:g} µs a hop. Nothing is overlapped."
    )
    yield (
        "Lengths are the dataset's, batches the run's own (eight of the first epoch); rows follow "
        "from how popular items are."
    )
    size = config.table.group_size
    if size:
        yield (
            f"The table: a copy for each {size} ranks (table.group_size); where it does not divide "
            "the ranks, one copy."
        )
    if plan.trial.whole.tokens < plan.load.most_tokens:
        half = _whole(plan.trial.half.tokens)
        whole = _whole(plan.trial.whole.tokens)
        yield (
            f"Memory and operations of a step: counted on {half} and {whole} tokens, and "
            "extrapolated by a straight line."
        )
    if config.split.kind != "leave_one_out":
        yield "Lengths are those of leave-one-out; a split by time trains on other ones."
    if config.stream.workers < 0:
        yield "Loaders: one a rank; where steps are quick, a run starts more."
    yield "Loaders and storage keep up."
    if zero_stage(config) == 3:
        yield "ZeRO 3's gathering of weights is in no figure of time and bytes."
    if zero_stage(config) in (1, 2) and machines.device is not None:
        yield (
            "DeepSpeed's reduce bucket lies on the device whole: set "
            "deepspeed.zero_optimization.reduce_bucket_size to the dense weights to spare it."
        )
    yield "Ranking over the whole catalogue (evaluate --ranking full) is not in it."


def _assumed_speed(plan: Plan, machines: Machines) -> Iterator[str]:
    """What a step's arithmetic is reckoned by."""
    device = machines.device
    if device is None:
        yield (
            "A step's arithmetic: measured just now on this machine's processor, in one process and "
            "with as many threads as a rank has. Ranks beside it on the same caches and memory are "
            "not in it."
        )
    else:
        bf16 = device.bf16 / 1e12
        fp32 = device.fp32 / 1e12
        yield (
            f"A step's arithmetic: {EFFICIENCY:.0%} of {device.name}'s peak ({bf16:g} TFLOP/s bf16, "
            f"{fp32:g} fp32), SC-MIM's comparisons {COMPARISON_EFFICIENCY:.0%}. An assumption, "
            "never measured."
        )


def _make_table(name: str, *columns: str) -> Table:
    """A table whose first column has names and whose other columns have figures."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column(
        name,
        no_wrap=True,
    )
    for column in columns:
        if column == "limit":
            table.add_column(
                column,
                overflow="fold",
            )
        else:
            table.add_column(
                column,
                justify="right",
                no_wrap=True,
            )
    return table


def _whole(number: float) -> str:
    """`12,345`."""
    return f"{number:,.0f}"


def _milliseconds(seconds: float) -> str:
    """`12.35` of 0.012345 s."""
    return f"{1e3 * seconds:.2f}"


def _size(count: float) -> str:
    """`1.2 GB`, and – for nothing."""
    return format_size(count) if count else "–"


def _count(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
