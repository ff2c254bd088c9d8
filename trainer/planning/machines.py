"""Ranks, hosts, devices and links that a plan is for.

Nothing about devices and links was measured here. Peaks are those of NVIDIA's data sheets (dense, no
sparsity); the shares that a step reaches of them are assumptions.
"""

import math
from dataclasses import dataclass

from trainer.errors import InputError

# Of the peak, what a step of this model reaches: assumed.
EFFICIENCY = 0.25
# Of the fp32 peak, what SC-MIM's comparisons reach: assumed.
COMPARISON_EFFICIENCY = 0.6
# Seconds of a step that no arithmetic explains: launches, Python, the loop. Assumed for a GPU; of a
# processor, and there of DeepSpeed's ZeRO beside it, set by the runs of docs/clusters.md.
STEP_SECONDS = 0.005
PROCESSOR_STEP_SECONDS = 0.010
PROCESSOR_ZERO_SECONDS = 0.025
# Of a collective, for each hop; of an all-to-all, for each rank. Assumed for NCCL.
MESSAGE_MICROSECONDS = 10.0
PEER_MICROSECONDS = 1.0
# Of gloo over the loopback: measured by benchmarks/limits.py on the machine of its record.
CPU_MESSAGE_MICROSECONDS = 240.0
CPU_INSIDE_GBYTE = 1.0


@dataclass(frozen=True)
class Device:
    """A kind of GPU.

    memory: bytes. fp32, bf16: peak operations a second, without TF32. inside_gbyte: GB/s that it
    sends to others of its host.
    """

    name: str
    memory: float
    fp32: float
    bf16: float
    inside_gbyte: float


DEVICES = {
    "A100": Device("A100", 80e9, 19.5e12, 312e12, 300),
    "H100": Device("H100", 80e9, 67e12, 989e12, 450),
    "H200": Device("H200", 141e9, 67e12, 989e12, 450),
}


@dataclass(frozen=True)
class Machines:
    """Where a run is to be. device: None for the processor of the machine that plans.

    between_gbit: Gbit/s that a host sends to others.
    """

    ranks: int
    hosts: int = 1
    device: Device | None = None
    between_gbit: float = 400.0

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.hosts < 1:
            raise InputError(
                f"--ranks {self.ranks} --hosts {self.hosts}: give at least 1"
            )
        if self.ranks % self.hosts:
            raise InputError(
                f"--ranks {self.ranks} on --hosts {self.hosts}: give as many on each host"
            )
        if not 0 < self.between_gbit < math.inf:
            raise InputError(
                f"--between-gbit is {self.between_gbit}: give more than 0"
            )

    @property
    def per_host(self) -> int:
        """Ranks of a host."""
        return self.ranks // self.hosts

    @property
    def inside_gbyte(self) -> float:
        """GB/s that a rank sends to others of its host."""
        if self.device is None:
            return CPU_INSIDE_GBYTE
        return self.device.inside_gbyte

    @property
    def message_microseconds(self) -> float:
        """Of a collective, for each hop."""
        if self.device is None:
            return CPU_MESSAGE_MICROSECONDS
        return MESSAGE_MICROSECONDS


def find_device(name: str) -> Device:
    """The GPU of that name. Raises InputError, which names those that are known."""
    device = DEVICES.get(name.upper())
    if device is None:
        raise InputError(
            f"--gpu {name} is not known: give {', '.join(DEVICES)}, or nothing to plan for this "
            "machine's processor"
        )
    return device
