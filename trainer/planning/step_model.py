"""How long a step takes on so many ranks: fitted on what was measured, and what follows for
more of them.

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
from dataclasses import dataclass

import numpy as np

from trainer.planning import traffic

PARAMETERS = ("fixed", "per_token", "per_message", "per_byte", "exposed")


@dataclass(frozen=True)
class Point:
    """A measured step. bandwidth: bytes a second, inf where nothing limits them; one rank has
    no messages and no bytes.
    """

    tokens: float
    messages: float
    bytes: float
    bandwidth: float
    seconds: float

    @property
    def terms(self) -> np.ndarray:
        """What each of the parameters is multiplied with."""
        return np.array(
            [
                1.0,
                self.tokens,
                self.messages,
                self.bytes,
                self.bytes / self.bandwidth,
            ]
        )


def fit(points: list[Point]) -> dict[str, float]:
    """{parameter: value}, from at least as many points as there are parameters."""
    terms = np.array([point.terms / point.seconds for point in points])
    scale = np.abs(terms).max(0)
    scale[scale == 0] = 1
    best = math.inf
    values = np.zeros(len(PARAMETERS))
    # Non-negative least squares, exactly: the best of all sets of parameters that may be other
    # than 0.
    for size in range(1, len(PARAMETERS) + 1):
        for kept in map(
            list, itertools.combinations(range(len(PARAMETERS)), size)
        ):
            found, *_ = np.linalg.lstsq(
                terms[:, kept] / scale[kept], np.ones(len(points)), rcond=None
            )
            error = float(
                ((terms[:, kept] / scale[kept] @ found - 1) ** 2).sum()
            )
            if (found >= 0).all() and error < best:
                best = error
                values = np.zeros(len(PARAMETERS))
                values[kept] = found / scale[kept]
    return dict(zip(PARAMETERS, values.tolist(), strict=True))


def predict(parameters: dict[str, float], point: Point) -> float:
    """Seconds of the step."""
    return float(
        point.terms @ np.array([parameters[name] for name in PARAMETERS])
    )


def left_out(points: list[Point]) -> list[float]:
    """For each point, what the others predict for it: seconds."""
    return [
        predict(fit(points[:i] + points[i + 1 :]), point)
        for i, point in enumerate(points)
    ]


@dataclass(frozen=True)
class Cluster:
    """What is assumed of GPUs, hosts and network; settings/scaling.yaml says what each is."""

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
    """A rank's share of a step, whatever the number of ranks: tokens, users, rows looked up;
    and the model: domains, width, trained weights of the dense part, ZeRO stage, SC-MIM's other
    users those of all ranks or of this one, or so many candidates a domain that stand for
    all.
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


def cluster_step(
    load: Load,
    cluster: Cluster,
    gpus: int,
    between_gbit: float,
    tokens_per_second: float,
) -> dict[str, float]:
    """Seconds of a step by part, {"compute", "SC-MIM's pairs", "rows", "dense", "SC-MIM",
    "messages"}, with nothing overlapped.

    - compute: the rank's tokens at `tokens_per_second`, times the imbalance.
    - SC-MIM's pairs: a rank's users against the other candidates: 6 · users · candidates ·
      domains · width operations; those against as many as its own are in its tokens' time.
    - rows (ids, rows, their gradients; all-to-all): what goes to other hosts passes the host's
      own cable, that of all its GPUs.
    - dense, SC-MIM (rings): inside a host at the GPUs' links; between hosts once for each host.
    - messages: so much for each hop of each collective, and for each rank of an all-to-all.
    """
    compute = load.tokens / tokens_per_second * cluster.imbalance
    if gpus == 1:
        return {"compute": compute}
    by_part = traffic.expected(
        gpus,
        load.dim,
        load.domains,
        load.users,
        load.weights,
        load.zero_stage,
        load.rows * (gpus - 1) / gpus,
        load.candidates,
    )
    if not load.global_negatives:
        by_part = {
            part: 0 if part.startswith("SC-MIM") else sent
            for part, sent in by_part.items()
        }
    inside = cluster.inside_gbyte * 1e9
    between = between_gbit * 1e9 / 8
    # Of what a rank sends to gpus − 1 others, so much leaves the host.
    leaving = max(0, gpus - cluster.per_host) / (gpus - 1)

    def all_to_all(sent):
        return (
            sent * (1 - leaving) / inside
            + cluster.per_host * sent * leaving / between
        )

    def ring(sent):
        """The whole host's ring enters and leaves it once; a rank's own part is the same on
        every link of the ring.
        """
        if gpus <= cluster.per_host:
            return sent / inside
        return max(sent / inside, sent / between)

    rows = sum(
        by_part[part]
        for part in ("numbers of ids", "ids", "rows", "row gradients")
    )
    dense = sum(
        by_part.get(part, 0) for part in ("dense gradients", "dense weights")
    )
    information = by_part["SC-MIM"] + by_part["SC-MIM gradients"]
    return {
        "compute": compute,
        "SC-MIM's pairs": _pair_operations(load, gpus) / cluster.fp32_flops,
        "rows": all_to_all(rows),
        "dense": ring(dense),
        "SC-MIM": ring(information),
        "messages": _message_seconds(cluster, gpus, len(by_part)),
    }


def _pair_operations(load, gpus):
    """Of a rank's users against the candidates that are not its own."""
    if not load.global_negatives:
        return 0
    compared = load.users * gpus
    if load.candidates:
        compared = min(compared, load.candidates)
    others = max(0, compared - load.users)
    return 6 * load.users * others * load.domains * load.dim


def _message_seconds(cluster, gpus, collectives):
    hops = math.ceil(math.log2(gpus))
    exchanges = 5  # all-to-alls: numbers, lengths, ids, rows, gradients
    microseconds = collectives * hops * cluster.message_microseconds
    microseconds += exchanges * gpus * cluster.peer_microseconds
    return microseconds * 1e-6
