"""What a rank takes of its device and of its host, part by part.

On a CPU all of it is the host's. Of the table it is `embeddings.placement.plan_capacity`, of loaders
`trainer.training.loader_memory`, by which a run itself plans; of activations it is the trial's.
"""

from dataclasses import dataclass

from embeddings.config import optimizer_name
from embeddings.placement import Capacity, HostNeeds, Room, plan_capacity
from embeddings.replicas import count_ranks_of_group
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.evaluation.inspect import InspectionConfig
from trainer.planning.batch_load import BatchLoad
from trainer.planning.machines import Machines
from trainer.planning.trial import Trial
from trainer.training.loader_memory import (
    estimate_batch_bytes,
    estimate_loader_bytes,
)

# Of CUDA's context, its kernels and its libraries' workspaces. Assumed.
_CONTEXT = 1.0e9
# Of activations, what an allocator has beside them and cannot use. Assumed for a GPU; of a processor
# set by the runs of docs/clusters.md.
_FRAGMENTS = 0.1
_PROCESSOR_FRAGMENTS = 0.08
# What a rank has of each token when it inspects the best model: its vectors, this many times. Set by
# those runs too.
_INSPECTED_COPIES = 6
_FLOAT = 4
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, where nothing is said
_ENOUGH = 2**60  # bytes of a host of which nobody knows how many it has


@dataclass(frozen=True)
class Part:
    """What one thing takes of a rank's device, or of a rank's share of the host. Bytes.

    in_process: whether it is the rank's own process that has it on the host.
    """

    name: str
    device: float = 0
    host: float = 0
    in_process: bool = True


@dataclass(frozen=True)
class Memory:
    """All that a rank takes, at most. refusal: why the table fits nowhere, in a line."""

    parts: tuple[Part, ...]
    refusal: str = ""

    @property
    def device(self) -> float:
        """Bytes of the rank's device."""
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> float:
        """Bytes of the host for this rank, its loaders too."""
        return sum(part.host for part in self.parts)

    @property
    def process(self) -> float:
        """Bytes of the host that are resident in the rank's own process."""
        return sum(part.host for part in self.parts if part.in_process)


def plan_table(
    config: RunConfig, dataset: Dataset, ranks: int, room: Room
) -> Capacity:
    """Where a rank's rows lie, and what they take; a run plans the same.

    Raises ValueError, with the arithmetic, where they fit nowhere, and where so many ranks cannot be
    cut into table.group_size.
    """
    loaders = estimate_loader_bytes(config, dataset, ranks)
    size = count_ranks_of_group(config.table, ranks)
    rows = -(-dataset.num_embeddings // size)
    return plan_capacity(
        config.table,
        optimizer_name(config.table),
        rows,
        config.model.dim,
        room,
        HostNeeds(checkpoints=True, loaders=loaders),
        copies=ranks // size,
    )


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage in force: DeepSpeed's own JSON wins."""
    section = config.deepspeed.get("zero_optimization", {})
    return int(section.get("stage", config.optimizer.zero_stage))


def dense_bytes(weights: int, stage: int, ranks: int) -> float:
    """Weights, gradients and Adam's two moments of the dense model on a rank, fp32.

        stage   weights      gradients    the optimizer's
        0       4 P          4 P          8 P
        1, 2    4 P          4 P          (4 + 8 + 4) P / W      weights and gradients of its part
        3       4 P          4 P          (4 + 8 + 4) P / W      weights: gathered while they are used

    P weights, W ranks.
    """
    whole = 2 * _FLOAT * weights
    if stage == 0:
        return whole + 2 * _FLOAT * weights
    return whole + 4 * _FLOAT * weights / ranks


def bucket_bytes(config: RunConfig, weights: int, on_device: bool) -> float:
    """DeepSpeed's buffer of gradients on their way, of ZeRO 1 and 2.

    A device has all of it; of a host's memory only what is written to is taken.
    """
    if zero_stage(config) not in (1, 2):
        return 0
    section = config.deepspeed.get("zero_optimization", {})
    numbers = int(section.get("reduce_bucket_size", _BUCKET))
    buffers = 2 if section.get("overlap_comm") else 1
    if not on_device:
        numbers = min(numbers, weights)
    return buffers * _FLOAT * numbers


def inspection_bytes(
    config: RunConfig, dataset: Dataset, ranks: int, load: BatchLoad
) -> float:
    """What a rank takes when it inspects the best model (trainer/evaluation/inspect.py)."""
    everyone = min(InspectionConfig().users, dataset.users)
    users = -(-everyone // ranks)
    vector = _FLOAT * config.model.dim
    return users * load.tokens / load.users * vector * _INSPECTED_COPIES


def plan_memory(
    config: RunConfig,
    dataset: Dataset,
    machines: Machines,
    load: BatchLoad,
    trial: Trial,
    process: float,
) -> Memory:
    """What a rank takes, at most. process: bytes of this process, with everything imported."""
    ranks = machines.ranks
    device = machines.device
    stage = zero_stage(config)
    dense = dense_bytes(trial.weights, stage, ranks)
    if config.optimizer.ema:
        dense += _FLOAT * trial.weights
    bucket = bucket_bytes(config, trial.weights, device is not None)
    steps = trial.bytes(load.most_tokens)
    held = config.stream.prefetch + 1
    batches = held * estimate_batch_bytes(config, dataset, ranks)
    loaders = estimate_loader_bytes(config, dataset, ranks)
    refusal = ""
    room = Room(None, _ENOUGH)
    if device is not None:
        left = device.memory - _CONTEXT - dense
        room = Room(int(left), _ENOUGH)
    try:
        table = plan_table(config, dataset, ranks, room)
    except ValueError as error:
        refusal = str(error)
        table = Capacity(0, False, 0, 0)
    parts = [
        Part("the process itself", host=process),
        Part("item table, its optimizer", table.device, table.host),
    ]
    inspected = inspection_bytes(config, dataset, ranks, load)
    tested = max(trial.evaluation, inspected)
    if device is None:
        # malloc keeps what was freed, and can seldom use it for the other's tensors.
        kept = 1 + _PROCESSOR_FRAGMENTS
        parts += [
            Part("dense model, gradients, optimizer", host=dense + bucket),
            Part("a step: activations, gradients", host=kept * steps),
            Part("a validation, or the test's look", host=kept * tested),
        ]
    else:
        parts[0] = Part("the process itself", _CONTEXT, process)
        most = (1 + _FRAGMENTS) * max(steps, tested)
        parts += [
            Part("dense model, gradients, optimizer", dense),
            Part("DeepSpeed's reduce bucket", bucket),
            Part("a step, a validation, the test's look", most),
        ]
    checkpoint = table.checkpoint + 3 * _FLOAT * trial.weights
    parts += [
        Part("a checkpoint's copy", host=checkpoint),
        Part("batches in hand", host=batches),
        Part("loader processes", host=loaders - batches, in_process=False),
    ]
    return Memory(tuple(parts), refusal)
