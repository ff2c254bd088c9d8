"""How long a step takes on so many ranks: fitted on what was measured, and what follows for more.

A rank's step takes

    seconds = fixed + per_token · tokens + per_message · messages + per_byte · bytes
              + exposed · bytes / bandwidth

tokens: interactions of the rank's users; messages: collectives of a step; bytes: what the rank
sends in them (`traffic`); bandwidth: of a cable between hosts, where there is one. per_byte is
what it costs the rank's own core to hand bytes over (copies, the kernel); 1 − exposed is the
share of the time on the cable that the rank spends on something else (overlap). None of the
five can be negative; they are those with the least sum of squared relative errors.

`cluster_step` puts the same collectives on another machine: see there for what it assumes.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trainer.planning import traffic

PARAMETERS = ("fixed", "per_token", "per_message", "per_byte", "exposed")
_EXCHANGES = 5  # all-to-alls: numbers, lengths, ids, rows, gradients
# Numbers and ids, there and back; gradients there, sums back.
_BETWEEN_COLLECTIVES = {traffic.IDS_BETWEEN: 4, traffic.GRADIENTS_BETWEEN: 2}
_DENSE = ("dense gradients", "dense weights")
_INFORMATION = ("SC-MIM", "SC-MIM gradients")


@dataclass(frozen=True)
class Point:
    """A measured step.

    bandwidth: bytes a second, inf where nothing limits them. One rank has no messages and no bytes.
    """

    tokens: float
    messages: float
    bytes: float
    bandwidth: float
    seconds: float

    @property
    def terms(self) -> np.ndarray:
        """What each of the parameters is multiplied with."""
        on_cable = self.bytes / self.bandwidth
        terms = [
            1.0,
            self.tokens,
            self.messages,
            self.bytes,
            on_cable,
        ]
        return np.array(terms)


def fit(points: list[Point]) -> dict[str, float]:
    """{parameter: value}, from at least as many points as there are parameters.

    Non-negative least squares, exactly: the best of all sets of parameters that may be other than 0.
    """
    rows = []
    for point in points:
        rows.append(point.terms / point.seconds)
    terms = np.array(rows)
    scale = np.abs(terms).max(0)
    scale[scale == 0] = 1
    scaled = terms / scale
    ones = np.ones(len(points))
    least_error = math.inf
    values = np.zeros(len(PARAMETERS))
    numbers = range(len(PARAMETERS))
    for size in range(1, len(PARAMETERS) + 1):
        for subset in itertools.combinations(numbers, size):
            kept = list(subset)
            chosen = scaled[:, kept]
            solution, *_ = np.linalg.lstsq(chosen, ones, rcond=None)
            error = float(((chosen @ solution - 1) ** 2).sum())
            if error < least_error and solution.min() >= 0:
                least_error = error
                values = np.zeros(len(PARAMETERS))
                values[kept] = solution / scale[kept]
    return dict(zip(PARAMETERS, values.tolist(), strict=True))


def predict(parameters: dict[str, float], point: Point) -> float:
    """Seconds of the step."""
    values = np.array([parameters[name] for name in PARAMETERS])
    return float(point.terms @ values)


def left_out(points: list[Point]) -> list[float]:
    """For each point, what the others predict for it: seconds."""
    predicted = []
    for number, point in enumerate(points):
        others = points[:number] + points[number + 1 :]
        parameters = fit(others)
        predicted.append(predict(parameters, point))
    return predicted


@dataclass(frozen=True)
class Cluster:
    """What is assumed of GPUs, hosts and network; benchmarks/settings/scaling.yaml says what each is."""

    gpus: list[int]
    per_host: int
    inside_gbyte: float
    between_gbit: list[float]
    message_microseconds: float
    peer_microseconds: float
    users: int
    tokens_per_second: list[float]
    fp32_flops: float
    imbalance: float


@dataclass(frozen=True)
class Load:
    """A rank's share of a step, whatever the number of ranks, and the model.

    Attributes:
        tokens: of the rank's users.
        users: of the rank.
        rows: that are looked up.
        domains: of the model.
        dim: its width.
        weights: trained numbers of the dense part.
        zero_stage: of DeepSpeed.
        global_negatives: whether SC-MIM's other users are those of all ranks, or of this one.
        candidates: users a domain that stand for all of them; 0: all do for themselves.
        communication: table.communication.
        copies: of the table; None: there is one.
    """

    tokens: float
    users: int
    rows: float
    domains: int
    dim: int
    weights: int
    zero_stage: int
    global_negatives: bool = True
    candidates: int = 0
    communication: str = "fp32"
    copies: traffic.Copies | None = None


@dataclass(frozen=True)
class _Links:
    """What carries a rank's bytes: bytes a second inside a host, and of a host to others."""

    gpus: int
    per_host: int
    inside: float
    between: float

    def all_to_all(self, sent: float, members: int, near: int) -> float:
        """Seconds: what goes to other hosts passes the host's own cable, that of all its GPUs.

        members: ranks that exchange. near: those of them that are on this rank's host.
        """
        if members == 1:
            return 0
        leaving = sent * max(0, members - near) / (members - 1)
        staying = sent - leaving
        on_cable = self.per_host * leaving / self.between
        return staying / self.inside + on_cable

    def ring(self, sent: float) -> float:
        """Seconds: the whole host's ring enters and leaves it once.

        A rank's own part is the same on every link of the ring.
        """
        slowest = self.inside
        if self.gpus > self.per_host:
            slowest = min(self.inside, self.between)
        return sent / slowest


def cluster_step(
    load: Load,
    cluster: Cluster,
    gpus: int,
    between_gbit: float,
    tokens_per_second: float,
) -> dict[str, float]:
    """Seconds of a step by part, with nothing overlapped; of one GPU "compute" alone.

    - compute: the rank's tokens at `tokens_per_second`, times the imbalance.
    - SC-MIM's pairs: a rank's users against the other candidates: 6 · users · candidates ·
      domains · width operations; those against as many as its own are in its tokens' time.
    - rows (ids, rows, their gradients; all-to-all): what goes to other hosts passes the host's
      own cable, that of all its GPUs.
    - copies of the table: what replicas tell each other, over the same cable.
    - dense, SC-MIM (rings): inside a host at the GPUs' links; between hosts once for each host.
    - messages: so much for each hop of each collective, and for each rank of an all-to-all.
    """
    alone = load.tokens / tokens_per_second
    compute = alone * cluster.imbalance
    if gpus == 1:
        return {"compute": compute}
    sent = _sent_by_part(load, gpus)
    links = _Links(
        gpus=gpus,
        per_host=cluster.per_host,
        inside=cluster.inside_gbyte * 1e9,
        between=between_gbit * 1e9 / 8,
    )
    pairs = _pair_operations(load, gpus)
    sharing = traffic.count_members("rows", gpus, load.copies)
    seconds = {
        "compute": compute,
        "SC-MIM's pairs": pairs / cluster.fp32_flops,
        "rows": links.all_to_all(
            _sum_of(sent, traffic.ROWS), sharing, cluster.per_host
        ),
        "dense": links.ring(_sum_of(sent, _DENSE)),
        "SC-MIM": links.ring(_sum_of(sent, _INFORMATION)),
        "messages": _message_seconds(cluster, gpus, sent, load.copies),
    }
    if load.copies:
        seconds["copies"] = links.all_to_all(
            _sum_of(sent, traffic.BETWEEN),
            gpus // sharing,
            max(1, cluster.per_host // sharing),
        )
    return seconds


def _sent_by_part(load: Load, gpus: int) -> dict[str, float]:
    """Bytes that a rank sends, by part; none for SC-MIM where its users are this rank's."""
    sharing = traffic.count_members("rows", gpus, load.copies)
    foreign = load.rows * (sharing - 1) / sharing
    sent = traffic.expected(
        gpus,
        load.dim,
        load.domains,
        load.users,
        load.weights,
        load.zero_stage,
        foreign,
        load.candidates,
        load.communication,
        load.copies,
    )
    if not load.global_negatives:
        for part in _INFORMATION:
            sent[part] = 0
    return sent


def _sum_of(sent: dict[str, float], parts: tuple[str, ...]) -> float:
    """Bytes of these parts together."""
    total = 0.0
    for part in parts:
        total += sent.get(part, 0)
    return total


def _pair_operations(load: Load, gpus: int) -> float:
    """Of a rank's users against the candidates that are not its own."""
    if not load.global_negatives:
        return 0
    compared = load.users * gpus
    if load.candidates:
        compared = min(compared, load.candidates)
    others = max(0, compared - load.users)
    width = load.domains * load.dim
    return 6 * load.users * others * width


def _message_seconds(
    cluster: Cluster,
    gpus: int,
    parts: Iterable[str],
    copies: traffic.Copies | None,
) -> float:
    """Seconds of hops and of peers, whatever they carry."""
    hops = 0
    for part in parts:
        members = traffic.count_members(part, gpus, copies)
        collectives = _BETWEEN_COLLECTIVES.get(part, 1)
        hops += collectives * math.ceil(math.log2(members))
    sharing = traffic.count_members("rows", gpus, copies)
    peers = _EXCHANGES * sharing
    if copies:
        peers += sum(_BETWEEN_COLLECTIVES.values()) * (gpus // sharing)
    of_hops = hops * cluster.message_microseconds
    of_peers = peers * cluster.peer_microseconds
    return (of_hops + of_peers) * 1e-6
