"""`launch/train.py --plan`: reads the dataset's description, plans, prints. Starts no rank."""

import os

import torch

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.distributed.launchers import World, read_world
from trainer.distributed.resources import keep_freed_memory
from trainer.errors import InputError
from trainer.planning.machines import Machines, find_device
from trainer.planning.prediction import RANKS_A_HOST, make_plan
from trainer.planning.report import print_plan


def plan_run(
    config: RunConfig,
    ranks: int | None,
    hosts: int | None,
    gpu: str | None,
    between_gbit: float,
) -> None:
    """Prints what a run of these settings will take. Raises InputError where it cannot be known.

    ranks, hosts: None: as the launcher has started them, whose first process alone prints. Of other
    ranks with a gpu, eight are on a host, where that divides them.
    """
    world = read_world()
    if world.rank > 0:
        return
    if ranks is None:
        ranks = world.size
    if hosts is None:
        hosts = _count_hosts(world, ranks, gpu)
    if not config.data:
        raise InputError(
            "data=DIR is missing: --plan needs the prepared dataset, whose lengths and items decide "
            "what a step takes"
        )
    device = find_device(gpu) if gpu else None
    machines = Machines(ranks, hosts, device, between_gbit)
    # As a rank has it (trainer.distributed.process_group).
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // machines.per_host))
    dataset = Dataset.load(config.data, False, config.stream, False)
    # A rank has all of it imported: what this process takes of memory is what a rank takes.
    import trainer.training.loop  # noqa: F401

    print_plan(make_plan(config, dataset, machines), config, dataset)


def _count_hosts(world: World, ranks: int, gpu: str | None) -> int:
    """On how many hosts the ranks are, where nothing says so."""
    if ranks == world.size and world.local_size:
        return world.size // world.local_size
    if gpu and ranks % RANKS_A_HOST == 0:
        return ranks // RANKS_A_HOST
    return 1
