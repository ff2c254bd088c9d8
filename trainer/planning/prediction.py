"""A plan: what a run takes of memory and network in a step, how long that takes, and what limits it."""

from dataclasses import dataclass, replace

from embeddings.replicas import count_ranks_of_group
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.errors import InputError
from trainer.planning import step_model, traffic
from trainer.planning.batch_load import BatchLoad, count_rows, measure_load
from trainer.planning.host_memory import reset_peak, resident_bytes
from trainer.planning.machines import (
    COMPARISON_EFFICIENCY,
    EFFICIENCY,
    PEER_MICROSECONDS,
    PROCESSOR_STEP_SECONDS,
    PROCESSOR_ZERO_SECONDS,
    STEP_SECONDS,
    Machines,
)
from trainer.planning.memory import Memory, plan_memory, zero_stage
from trainer.planning.traffic import Sent
from trainer.planning.trial import Trial, try_model

RANKS = (8, 16, 32, 64, 128, 256, 512)
RANKS_A_HOST = 8

# What a step waits for, where a part of it takes longest.
_LIMITS = {
    "compute": "the dense model's arithmetic",
    "SC-MIM's pairs": "SC-MIM's comparisons with other ranks' users",
    "rows": "rows and their gradients on their way (all-to-all)",
    "dense": "the dense model's gradients on their way (all-reduce)",
    "SC-MIM": "SC-MIM's vectors on their way",
    "messages": "the number of messages",
    "copies": "gradients between copies of the table",
}


@dataclass(frozen=True)
class Scaled:
    """A line of the table by number of ranks, each of which has as many users as in the plan.

    seconds: of a step. efficiency: the step on a rank alone over this one. process: bytes of a rank's
    device; of its process, where it has none.
    """

    machines: Machines
    users: int
    seconds: float
    limit: str
    efficiency: float
    sent: float
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What a run takes. seconds: of a step, by part."""

    machines: Machines
    load: BatchLoad
    trial: Trial
    memory: Memory
    sent: dict[str, Sent]
    seconds: dict[str, float]
    scaled: tuple[Scaled, ...]

    @property
    def step_seconds(self) -> float:
        """Of a step, with nothing overlapped."""
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        return find_limit(self.seconds)


def make_plan(
    config: RunConfig, dataset: Dataset, machines: Machines, timed: bool = True
) -> Plan:
    """Plans a run. timed: False where seconds of this machine's processor are not wanted.

    Raises InputError where the dataset cannot be cut for so many ranks.
    """
    try:
        count_ranks_of_group(config.table, machines.ranks)
    except ValueError as error:
        raise InputError(str(error)) from None
    load = measure_load(config, dataset, machines.ranks)
    on_device = machines.device is not None
    trial = try_model(config, dataset, load, timed and not on_device, on_device)
    # After the trial: a rank, too, has run the code that it has loaded.
    process = reset_peak() or resident_bytes()
    memory = plan_memory(config, dataset, machines, load, trial, process)
    seconds = predict_seconds(config, dataset, machines, load, trial)
    scaled = []
    for ranks in RANKS:
        hosts = -(-ranks // RANKS_A_HOST)
        many = replace(machines, ranks=ranks, hosts=hosts)
        scaled.append(_scale(config, dataset, many, load, trial, process))
    return Plan(
        machines,
        load,
        trial,
        memory,
        count_sent(config, dataset, machines, load, trial.weights),
        seconds,
        tuple(scaled),
    )


def find_limit(seconds: dict[str, float]) -> str:
    """What takes most of a step, in words."""
    part = max(seconds, key=lambda name: seconds[name])
    return _LIMITS[part]


def count_sent(
    config: RunConfig,
    dataset: Dataset,
    machines: Machines,
    load: BatchLoad,
    weights: int,
) -> dict[str, Sent]:
    """{part: what a rank sends for it in a step}; nothing of one rank alone."""
    ranks = machines.ranks
    candidates = config.model.mutual_information_candidates
    copies = _count_copies(config, dataset, ranks, load)
    sharing = traffic.count_members("rows", ranks, copies)
    by_part = traffic.expected(
        ranks,
        config.model.dim,
        len(dataset.domains),
        load.users,
        weights,
        zero_stage(config),
        load.rows * (sharing - 1) / sharing,
        candidates,
        config.table.communication,
        copies,
    )
    collectives = traffic.count_collectives(ranks, load.users, candidates)
    sent = {}
    for part, size in by_part.items():
        if part.startswith("SC-MIM") and not _compares_all(config):
            continue
        kind, count = collectives[part]
        members = traffic.count_members(part, ranks, copies)
        messages = count * traffic.messages(kind, members)
        sent[part] = Sent(count, messages, size)
    return sent


def predict_seconds(
    config: RunConfig,
    dataset: Dataset,
    machines: Machines,
    load: BatchLoad,
    trial: Trial,
) -> dict[str, float]:
    """Seconds of a step by part, `step_model.cluster_step`'s."""
    device = machines.device
    if device is None:
        compute = trial.seconds(load.tokens)
        comparisons = trial.operations(load.tokens) / max(compute, 1e-9)
    else:
        bf16 = config.model.precision == "bf16"
        peak = device.bf16 if bf16 else device.fp32
        compute = trial.operations(load.tokens) / (EFFICIENCY * peak)
        comparisons = COMPARISON_EFFICIENCY * device.fp32
    compute += overhead_seconds(config, machines)
    cluster = step_model.Cluster(
        gpus=[machines.ranks],
        per_host=machines.per_host,
        inside_gbyte=machines.inside_gbyte,
        between_gbit=[machines.between_gbit],
        message_microseconds=machines.message_microseconds,
        peer_microseconds=PEER_MICROSECONDS,
        users=load.users,
        tokens_per_second=[load.tokens / compute],
        fp32_flops=comparisons,
        imbalance=load.imbalance,
    )
    share = step_model.Load(
        tokens=load.tokens,
        users=load.users,
        rows=load.rows,
        domains=len(dataset.domains),
        dim=config.model.dim,
        weights=trial.weights,
        zero_stage=zero_stage(config),
        global_negatives=_compares_all(config),
        candidates=config.model.mutual_information_candidates,
        communication=config.table.communication,
        copies=_count_copies(config, dataset, machines.ranks, load),
    )
    return step_model.cluster_step(
        share,
        cluster,
        machines.ranks,
        machines.between_gbit,
        load.tokens / compute,
    )


def _count_copies(
    config: RunConfig, dataset: Dataset, ranks: int, load: BatchLoad
) -> traffic.Copies | None:
    """Which rows a group and all ranks look up; None where the table has one copy."""
    size = count_ranks_of_group(config.table, ranks)
    if size == ranks:
        return None
    return traffic.Copies(
        size,
        count_rows(config, dataset, load.uses_D * size),
        count_rows(config, dataset, load.uses_D * ranks),
    )


def overhead_seconds(config: RunConfig, machines: Machines) -> float:
    """Seconds of a step that are the program's own."""
    if machines.device is not None:
        return STEP_SECONDS
    if zero_stage(config) == 0:
        return PROCESSOR_STEP_SECONDS
    return PROCESSOR_STEP_SECONDS + PROCESSOR_ZERO_SECONDS


def _compares_all(config: RunConfig) -> bool:
    """Whether SC-MIM tells a user apart from those of other ranks."""
    model = config.model
    return (
        model.mutual_information
        and model.mutual_information_negatives != "rank"
    )


def _scale(
    config: RunConfig,
    dataset: Dataset,
    machines: Machines,
    load: BatchLoad,
    trial: Trial,
    process: float,
) -> Scaled:
    """The plan's users a rank, on so many ranks; with one copy of the table where they have no groups."""
    config = replace(config, global_batch_size=machines.ranks * load.users)
    group_size = config.table.group_size
    if group_size and machines.ranks % group_size:
        config = replace(config, table=replace(config.table, group_size=0))
    memory = plan_memory(config, dataset, machines, load, trial, process)
    seconds = predict_seconds(config, dataset, machines, load, trial)
    alone = replace(machines, ranks=1, hosts=1)
    one_copy = replace(config, table=replace(config.table, group_size=0))
    alone_seconds = predict_seconds(one_copy, dataset, alone, load, trial)
    sent = count_sent(config, dataset, machines, load, trial.weights)
    total = sum(seconds.values())
    return Scaled(
        machines,
        machines.ranks * load.users,
        total,
        find_limit(seconds),
        sum(alone_seconds.values()) / total,
        sum(part.bytes for part in sent.values()),
        memory,
    )
