"""Clocks, links by pair of hosts, and collectives, measured by messages like those of a run.

A host takes part by its first rank. Messages begin small and grow until one takes long enough to be
measured, so that a slow link takes no longer than a fast one:

    64 KiB → 512 KiB → 4 MiB → 32 MiB

Leaders are the first ranks of the hosts, such as {"host0": 0, "host1": 2} of two hosts with two
ranks each. Tensors hold N bytes.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.agreement import max_of_ranks
from trainer.distributed.process_group import Ranks
from trainer.doctor.facts import Collective, Link

Leaders = dict[str, int]

_ROUNDS = 20  # of a small message
_CLOCK_ROUNDS = 5
_FIRST_SIZE = 2**16
_LARGEST_SIZE = 2**25
_GROWTH = 8
_NUMBER = 4  # bytes of one
_LONG_ENOUGH = 0.05  # seconds of a message that tells the bandwidth
_END = 0  # the size after the last message


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every two of `count` hosts meet once, as many at a time as can.

    Hosts sit in a circle, and all but the first move on by a seat (circle method). One host of an
    odd number has nobody to meet.

        pair_rounds(4)    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
        pair_rounds(3)    [[(1, 2)], [(0, 2)], [(0, 1)]]
    """
    seats = list(range(count + count % 2))
    rounds = []
    for _ in seats[1:]:
        pairs = []
        for one, other in zip(seats, reversed(seats), strict=True):
            # Each pair is there from both its sides.
            if one < other < count:
                pairs.append((one, other))
        rounds.append(pairs)
        last = seats.pop()
        seats.insert(1, last)
    return rounds


def measure_links(ranks: Ranks, leaders: Leaders) -> list[Link]:
    """The links that this rank measured, as the first of their two hosts. Collective.

    rank 0   [Link(["host0", "host1"], latency=5e-5, bandwidth=1.2e9)]
    rank 2   []
    """
    hosts = list(leaders)
    links = []
    for pairs in pair_rounds(len(hosts)):
        for one, other in pairs:
            pair = [hosts[one], hosts[other]]
            first = leaders[hosts[one]]
            second = leaders[hosts[other]]
            if ranks.rank == first:
                link = _lead(pair, second, ranks.device)
                links.append(link)
            elif ranks.rank == second:
                _follow(first, ranks.device)
        max_of_ranks(0)  # a round ends before the next begins
    return links


def _lead(pair: list[str], peer: int, device: torch.device) -> Link:
    """Measures the link to a peer, which follows.

    The peer is told the size of each message:

        here    1 byte … 1 byte   65536, so many   524288, so many   1048576, so many   0
        peer    1 byte … 1 byte          so many           so many            so many
    """
    small_N = _message(1, device)
    trips = []
    for _ in range(_ROUNDS):
        seconds = _return_trip(small_N, peer)
        trips.append(seconds)
    latency = statistics.median(trips) / 2
    size = _FIRST_SIZE
    seconds = _time_message(size, peer, device)
    while seconds < _LONG_ENOUGH and size < _LARGEST_SIZE:
        size *= _GROWTH
        seconds = _time_message(size, peer, device)
    twice = _time_message(2 * size, peer, device)
    _tell(_END, peer)
    # What twice as many bytes take more: a limit lets some pass at once before it holds.
    more = max(twice - seconds, twice / 4)
    return Link(pair, latency, 2 * size / more)


def _time_message(size: int, peer: int, device: torch.device) -> float:
    """The seconds that a message of so many bytes takes to a peer, who follows, and back."""
    _tell(size, peer)
    return _return_trip(_message(size, device), peer)


def _follow(peer: int, device: torch.device) -> None:
    """Returns what a peer that leads sends."""
    small_N = _message(1, device)
    for _ in range(_ROUNDS):
        _return(small_N, peer)
    number = torch.tensor([_END])
    while True:
        dist.recv(number, peer)
        size = int(number)
        if size == _END:
            return
        large_N = _message(size, device)
        _return(large_N, peer)


def _message(size: int, device: torch.device) -> Tensor:
    """A tensor of so many bytes."""
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _tell(size: int, peer: int) -> None:
    """Tells a peer a number, over the CPU's backend."""
    number = torch.tensor([size])
    dist.send(number, peer)


def _return_trip(message_N: Tensor, peer: int) -> float:
    """The seconds that a message takes to a peer and back."""

    def go() -> None:
        dist.send(message_N, peer)
        dist.recv(message_N, peer)

    return _measure_seconds(go, message_N.device)


def _return(message_N: Tensor, peer: int) -> None:
    """Takes a message of a peer and sends it back."""
    dist.recv(message_N, peer)
    dist.send(message_N, peer)


def _measure_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of a call, with what it gives to the device."""
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure_collectives(ranks: Ranks) -> list[Collective]:
    """All-reduce and all-to-all of all ranks; none of one rank. Collective.

    A rank sends its part to W − 1 of W ranks in an all-to-all, and twice as much in an all-reduce,
    whose ring goes round twice.
    """
    world = ranks.world_size
    if world == 1:
        return []
    share = (world - 1) / world

    def reduce_all(size: int) -> None:
        bytes_N = _message(size, ranks.device)
        dist.all_reduce(bytes_N.view(torch.float32))

    def exchange_all(size: int) -> None:
        whole = size - size % world + world
        given_N = _message(whole, ranks.device)
        taken_N = torch.empty_like(given_N)
        dist.all_to_all_single(taken_N, given_N)

    return [
        _measure("all-reduce", ranks, reduce_all, 2 * share),
        _measure("all-to-all", ranks, exchange_all, share),
    ]


def _measure(
    name: str,
    ranks: Ranks,
    exchange: Callable[[int], None],
    sent: float,
) -> Collective:
    """Latency and bandwidth of a collective. Collective.

    exchange: of a tensor's bytes, the call. sent: what a rank sends of its tensor's size.
    """

    def measure(size: int) -> float:
        return _measure_seconds(lambda: exchange(size), ranks.device)

    latencies = [measure(_NUMBER) for _ in range(_ROUNDS)]
    size = _FIRST_SIZE
    while True:
        seconds = measure(size)
        # One answer for all, or a rank would go on alone.
        nanoseconds = max_of_ranks(int(1e9 * seconds))
        slowest = nanoseconds / 1e9
        if slowest > _LONG_ENOUGH or size >= _LARGEST_SIZE:
            break
        size *= _GROWTH
    latency = statistics.median(latencies)
    return Collective(name, latency, sent * size / slowest)


def measure_clocks(
    ranks: Ranks,
    leaders: Leaders,
    clock: Callable[[], float] = time.time,
) -> dict[str, float]:
    """Seconds that each host's clock is ahead of the first rank's. Collective.

        {"host0": 0.0, "host1": 3600.0}    on the first rank; zeros elsewhere

    clock: this host's.
    """
    ahead = dict.fromkeys(leaders, 0.0)
    for host, peer in leaders.items():
        if peer == 0:
            continue
        if ranks.rank == peer:
            _tell_time(clock)
        elif ranks.first:
            ahead[host] = _ask_time(peer, clock)
    return ahead


def _ask_time(peer: int, clock: Callable[[], float]) -> float:
    """Seconds that a peer's clock is ahead.

    Of some questions the one that was answered soonest counts. Its answer was given halfway:

        asked at 10.0, answered at 10.2, by a clock that showed 13.1: 3.0 ahead
    """
    soonest = float("inf")
    ahead = 0.0
    shown = torch.zeros(1, dtype=torch.float64)
    for _ in range(_CLOCK_ROUNDS):
        asked = clock()
        _return_trip(shown, peer)
        answered = clock()
        if answered - asked < soonest:
            soonest = answered - asked
            ahead = float(shown) - (asked + answered) / 2
    return ahead


def _tell_time(clock: Callable[[], float]) -> None:
    """Answers the first rank, which asks for the time."""
    shown = torch.zeros(1, dtype=torch.float64)
    for _ in range(_CLOCK_ROUNDS):
        dist.recv(shown, 0)
        shown[0] = clock()
        dist.send(shown, 0)
