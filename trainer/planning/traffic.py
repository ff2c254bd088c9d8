"""What a rank sends in a step, by formula, from the sizes of batch and model alone.

Held against what real ranks send by tests/unit/benchmarks/test_scaling.py (bytes by call) and
benchmarks/messages.py. Backends use other algorithms for small tensors, and NCCL chooses by itself.
"""

from dataclasses import dataclass

from embeddings.codecs import gradient_bytes, row_bytes
from embeddings.table import count_bags

_ID = 8  # bytes of a row's number as TorchRec sends it
_SHORT_ID = 4  # as replicas send it
_LENGTH = 4  # of the number of ids in a bag
# Both norms and the probe of what is not finite; the ranks' signals.
_CHECKED = 3 + 4
_FLOAT = 4

ALL_REDUCE = "all_reduce"
_ALL_TO_ALL = "all_to_all_single"
_ALL_GATHER = "all_gather"
_SUMS = "φ, λ and means"
ROWS = ("numbers of ids", "ids", "rows", "row gradients")
IDS_BETWEEN = "ids between copies"
GRADIENTS_BETWEEN = "gradients between copies"
BETWEEN = (IDS_BETWEEN, GRADIENTS_BETWEEN)
_GATHERS = ("all_gather", "all_gather_into_tensor")

# Each part of a step: the collective that it is, and how many of them.
_COLLECTIVES = {
    "numbers of ids": (_ALL_TO_ALL, 2),
    "ids": (_ALL_TO_ALL, 1),
    "rows": (_ALL_TO_ALL, 1),
    "row gradients": (_ALL_TO_ALL, 1),
    # Half of them are all-gathers, which have as many messages.
    IDS_BETWEEN: (_ALL_TO_ALL, 4),
    GRADIENTS_BETWEEN: (_ALL_TO_ALL, 2),
    _SUMS: (ALL_REDUCE, 1),
    "SC-MIM": (_ALL_GATHER, 2),
    "SC-MIM gradients": (_ALL_GATHER, 1),
    "dense gradients": (ALL_REDUCE, 1),
    "dense weights": (_ALL_GATHER, 1),
    "clip, check, signals": (ALL_REDUCE, 1),
}
# The same where a sample of users stands for all in SC-MIM.
_OF_SAMPLE = {
    "SC-MIM": (ALL_REDUCE, 1),
    "SC-MIM gradients": (ALL_REDUCE, 1),
    _SUMS: (ALL_REDUCE, 2),
}


@dataclass(frozen=True)
class Copies:
    """Copies of the table on groups of ranks (embeddings/replicas.py).

    Attributes:
        ranks: of a group.
        group_rows: distinct rows that a group looks up in a step.
        rows: distinct rows that all ranks look up.
    """

    ranks: int
    group_rows: float
    rows: float


@dataclass(frozen=True)
class Sent:
    """What a rank sends in a step for one part of it, the mean over ranks."""

    collectives: int
    messages: int
    bytes: float


def sent(kind: str, payload: int, world: int, own: int = 0) -> float:
    """Bytes that a rank sends in a collective, the mean over ranks.

    With the backends' algorithms for much data. payload: bytes of the rank's own tensor. own: those
    of an all-to-all that stay where they are.
    """
    if kind == _ALL_TO_ALL:
        return payload - own
    if kind in _GATHERS:
        return (world - 1) * payload
    # Each part of the tensor is summed around a ring, and the sums go around it. gloo's reduce-
    # scatter does both too.
    return 2 * (world - 1) / world * payload


def messages(kind: str, world: int) -> int:
    """How many messages a rank sends in a collective, one after the other, by gloo's algorithms."""
    if kind == _ALL_TO_ALL or kind in _GATHERS:
        return world - 1
    return 2 * (world - 1)


def expected(
    world: int,
    dim: int,
    domains: int,
    users: int,
    weights: int,
    zero_stage: int,
    foreign: float,
    candidates: int = 0,
    communication: str = "fp32",
    copies: Copies | None = None,
) -> dict[str, float]:
    """{part: bytes that a rank sends in a step, the mean over ranks}.

    Reductions of a few numbers are in it, so that nothing is missing.

    Args:
        world: ranks.
        users: of a rank.
        weights: trained weights of the dense model.
        foreign: rows that a rank looks up at others, the mean over ranks.
        candidates: users a domain that stand for all of a larger batch in SC-MIM; 0: all do for
            themselves.
        communication: table.communication, which says how long a row is on its way.
        copies: of the table; None: there is one, on all ranks.
    """
    if world == 1:
        return {}
    sharing = copies.ranks if copies else world
    others = (world - 1) / world
    gathered = users * domains * _FLOAT * dim
    # The vectors, and which of them there are.
    shown = gathered + users * domains
    by_part = {
        # How many lengths, ids and bags go to each rank; the lengths of the bags.
        "numbers of ids": (sharing - 1)
        * (3 * _ID + count_bags(sharing) * _LENGTH),
        "ids": foreign * _ID,
        "rows": foreign * row_bytes(communication, dim),
        "row gradients": foreign * gradient_bytes(communication, dim),
        _SUMS: 2 * others * 8 * 8 * domains,
        "SC-MIM": (world - 1) * shown,
        "SC-MIM gradients": (world - 1) * gathered,
        "dense gradients": 2 * others * _FLOAT * weights,
        "clip, check, signals": 2 * others * _CHECKED * 8,
    }
    if 0 < candidates < world * users:
        # Summed into their places.
        sample = 2 * others * _FLOAT * domains * candidates * dim
        by_part["SC-MIM"] = sample
        by_part["SC-MIM gradients"] = sample
        # Which of them there are; users by domain.
        by_part[_SUMS] += 2 * others * 8 * domains * (candidates + 1)
    if copies:
        by_part |= _between_copies(world, dim, communication, copies)
    if zero_stage in (1, 2):
        by_part["dense weights"] = others * _FLOAT * weights
    return by_part


def _between_copies(
    world: int, dim: int, communication: str, copies: Copies
) -> dict[str, float]:
    """What a rank sends its replicas: its group's rows to those that sum them, and its own sums."""
    groups = world // copies.ranks
    others = groups - 1
    summed = others / groups * copies.group_rows / copies.ranks
    rows = summed + others * copies.rows / world
    return {
        # Two numbers to each, how many rows come.
        IDS_BETWEEN: others * 2 * _ID + rows * _SHORT_ID,
        GRADIENTS_BETWEEN: rows * gradient_bytes(communication, dim),
    }


def count_members(part: str, world: int, copies: Copies | None) -> int:
    """How many ranks take part in a part's collectives."""
    if copies and part in ROWS:
        return copies.ranks
    if copies and part in BETWEEN:
        return world // copies.ranks
    return world


def count_collectives(
    world: int, users: int, candidates: int
) -> dict[str, tuple[str, int]]:
    """{part of `expected`: (kind of its collectives, how many)}."""
    if 0 < candidates < world * users:
        return _COLLECTIVES | _OF_SAMPLE
    return _COLLECTIVES
