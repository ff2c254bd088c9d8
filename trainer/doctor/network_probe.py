"""Clocks, links by pair of hosts, and collectives, measured by messages like those of a run.

A host takes part by its first rank. Messages begin small and grow until one takes long enough to be
measured, so that a slow link takes no longer than a fast one.

Tensors are bytes: N of a message, W ranks.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from trainer.distributed.agreement import max_of_ranks
from trainer.distributed.process_group import Ranks
from trainer.doctor.facts import Collective, Link

_ROUNDS = 20  # of a small message
_CLOCK_ROUNDS = 5
_FIRST_SIZE = 2**16
_LARGEST_SIZE = 2**26
_GROWTH = 8
_LONG_ENOUGH = 0.05  # seconds of a message that tells the bandwidth


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every two of `count` hosts meet once, as many at a time as can (circle method).

    pair_rounds(4)    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    seats: list[int | None] = list(range(count))
    if count % 2:
        seats.append(None)
    half = len(seats) // 2
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = []
        for one, other in zip(
            seats[:half], reversed(seats[half:]), strict=True
        ):
            if one is not None and other is not None:
                pairs.append((min(one, other), max(one, other)))
        rounds.append(pairs)
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_links(ranks: Ranks, leaders: dict[str, int]) -> list[Link]:
    """The links that this rank measured, as the first of their two hosts. Collective.

    leaders: the first rank of each host.
    """
    hosts = list(leaders)
    links = []
    for pairs in pair_rounds(len(hosts)):
        for one, other in pairs:
            first = leaders[hosts[one]]
            second = leaders[hosts[other]]
            if ranks.rank == first:
                latency, bandwidth = _lead(second, ranks.device)
                names = (hosts[one], hosts[other])
                links.append(Link(names, latency, bandwidth))
            if ranks.rank == second:
                _follow(first, ranks.device)
        max_of_ranks(0)  # a round ends before the next begins
    return links


def _lead(peer: int, device: torch.device) -> tuple[float, float]:
    """Latency and bandwidth of the way to a peer, which follows."""
    small_N = torch.zeros(1, dtype=torch.uint8, device=device)
    ways = []
    for _ in range(_ROUNDS):
        ways.append(_return_trip(small_N, peer) / 2)
    latency = statistics.median(ways)
    size = _FIRST_SIZE
    seconds = 0.0
    while True:
        before = seconds
        dist.send(torch.tensor([size]), peer)
        large_N = torch.zeros(size, dtype=torch.uint8, device=device)
        seconds = _return_trip(large_N, peer)
        # The second one of a size: the first may have passed in a limit's burst.
        if before > _LONG_ENOUGH or size >= _LARGEST_SIZE:
            break
        if seconds <= _LONG_ENOUGH:
            size *= _GROWTH
    dist.send(torch.tensor([0]), peer)
    return latency, 2 * size / seconds


def _follow(peer: int, device: torch.device) -> None:
    """Returns what a peer that leads sends."""
    small_N = torch.zeros(1, dtype=torch.uint8, device=device)
    for _ in range(_ROUNDS):
        _return(small_N, peer)
    size = torch.empty(1, dtype=torch.int64)
    while True:
        dist.recv(size, peer)
        if not int(size):
            return
        large_N = torch.empty(int(size), dtype=torch.uint8, device=device)
        _return(large_N, peer)


def _return_trip(message_N: torch.Tensor, peer: int) -> float:
    """The seconds that a message takes to a peer and back."""
    _finish(message_N)
    begun = time.perf_counter()
    dist.send(message_N, peer)
    dist.recv(message_N, peer)
    _finish(message_N)
    return time.perf_counter() - begun


def _return(message_N: torch.Tensor, peer: int) -> None:
    """Takes a message of a peer and sends it back."""
    dist.recv(message_N, peer)
    dist.send(message_N, peer)


def _finish(tensor: torch.Tensor) -> None:
    """Waits for what the device was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def measure_collectives(ranks: Ranks) -> list[Collective]:
    """All-reduce and all-to-all of all ranks. Collective."""
    world = ranks.world_size
    if world == 1:
        return []

    def reduce_all(size: int) -> Callable[[], object]:
        values = torch.zeros(size // 4, device=ranks.device)
        return lambda: dist.all_reduce(values)

    def exchange_all(size: int) -> Callable[[], object]:
        given = torch.zeros(world, size // 4 // world + 1, device=ranks.device)
        taken = torch.empty_like(given)
        return lambda: dist.all_to_all_single(taken, given)

    # What a rank sends, in sizes of its tensor: a ring goes round twice.
    return [
        _measure("all-reduce", ranks, reduce_all, 2 * (world - 1) / world),
        _measure("all-to-all", ranks, exchange_all, (world - 1) / world),
    ]


def _measure(
    name: str,
    ranks: Ranks,
    prepare: Callable[[int], Callable[[], object]],
    sent: float,
) -> Collective:
    """Latency and bandwidth of a collective. Collective.

    prepare: of a tensor's bytes, the call. sent: what a rank sends of its tensor's size.
    """
    latencies = []
    small = prepare(4)
    for _ in range(_ROUNDS):
        latencies.append(_time(small, ranks.device))
    size = _FIRST_SIZE
    while True:
        seconds = _time(prepare(size), ranks.device)
        # One answer for all, or a rank would go on alone.
        microseconds = max_of_ranks(int(1e6 * seconds) + 1)
        if microseconds > 1e6 * _LONG_ENOUGH or size >= _LARGEST_SIZE:
            break
        size *= _GROWTH
    bandwidth = sent * size / (microseconds / 1e6)
    return Collective(name, statistics.median(latencies), bandwidth)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of a call, with what it gives to the device."""
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure_clocks(
    ranks: Ranks,
    leaders: dict[str, int],
    clock: Callable[[], float] = time.time,
) -> dict[str, float]:
    """Seconds that each host's clock is ahead of the first rank's; known to the first rank. Collective.

    Of five questions the one that was answered soonest counts; its answer was given halfway.
    clock: this host's.
    """
    ahead = {}
    for host, peer in leaders.items():
        if peer == 0:
            ahead[host] = 0.0
            continue
        if ranks.rank == peer:
            _tell_time(clock)
        if ranks.first:
            ahead[host] = _ask_time(peer, clock)
    return ahead


def _ask_time(peer: int, clock: Callable[[], float]) -> float:
    """Seconds that a peer's clock is ahead."""
    soonest = float("inf")
    ahead = 0.0
    time_1 = torch.zeros(1, dtype=torch.float64)
    for _ in range(_CLOCK_ROUNDS):
        asked = clock()
        dist.send(time_1, peer)
        dist.recv(time_1, peer)
        answered = clock()
        if answered - asked < soonest:
            soonest = answered - asked
            ahead = float(time_1) - (asked + answered) / 2
    return ahead


def _tell_time(clock: Callable[[], float]) -> None:
    """Answers the first rank, which asks for the time."""
    time_1 = torch.zeros(1, dtype=torch.float64)
    for _ in range(_CLOCK_ROUNDS):
        dist.recv(time_1, 0)
        time_1[0] = clock()
        dist.send(time_1, 0)
