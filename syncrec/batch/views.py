"""A batch as the model sees it: both views of every user, packed, without one padded token.

A user's history x_1 … x_n (oldest first) becomes, as in Fig. 2 of the paper,

- one cross-domain sequence   SOS, x_1, …, x_{n-1}                  whose token t predicts x_t, and
- per domain d a compact one  SOS, those of x_1 … x_{n-1} in d      whose tokens predict the
                                                                    user's items of d.

Of each sequence the newest `max_length` tokens remain. Both views therefore run over the same
input items and predict the same interactions. An interaction whose predictor remains in both is
*comparable*: the negative transfer gap φ is taken over those.

Sizes: B users, N interactions, D domains, M tokens of a view, S sequences of a view, L targets of
a view, U distinct rows, P padded slots of attention, r embedding width. Everything is built by
NumPy in a loader's worker process (syncrec/batch/build.py), where int32 is half the work; `move`
makes all integers the int64 that indexing asks for. Sizes that the model needs on the host
(offsets, bucket shapes) are Python integers, so that reading them never waits for a device. Times
are ticks (syncrec/layers/time_encoding.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from syncrec.batch.attention_layout import AttentionLayout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# One of this module's dataclasses.
_Packed = TypeVar("_Packed", bound="DataclassInstance")


@dataclass(frozen=True)
class View:
    """One packed set of sequences: the cross-domain view, or the single-domain view.

    The sequences of the single-domain view are sorted by domain, then user. The head of
    syncrec/batch/build.py draws an example of both.

    Attributes:
        input_M: 0 for SOS, else 1 + the interaction that is the token's input.
        position_M: distance from the sequence's newest token.
        target_time_M: the time for which the token predicts, that of its target; 0 where it has
            no target.
        gap_M: how long after the token's input that is, as `compute_gaps` of
            syncrec/layers/time_encoding.py numbers it.
        sequence_M: the token's sequence.
        sequences: S.
        task_starts: where each task's tokens begin, and M. The cross-domain view is one task, the
            single-domain view one a domain.
        target_token_L: the token that predicts. Targets are sorted by their domain.
        target_interaction_L: the interaction that is predicted.
        target_domain_L: its domain.
        target_weight_L: its user's weight.
        comparable_L: whether the other view predicts it too.
        target_starts: where each domain's targets begin, and L; D + 1 numbers.
        pool_token: the tokens that stand for their user's domain in SC-MIM.
        pool_slot: user · D + domain of each of these.
        attention: where sequences begin, and their buckets.
    """

    input_M: Tensor
    position_M: Tensor
    target_time_M: Tensor
    gap_M: Tensor
    sequence_M: Tensor
    sequences: int
    task_starts: tuple[int, ...]
    target_token_L: Tensor
    target_interaction_L: Tensor
    target_domain_L: Tensor
    target_weight_L: Tensor
    comparable_L: Tensor
    target_starts: tuple[int, ...]
    pool_token: Tensor
    pool_slot: Tensor
    attention: AttentionLayout


@dataclass(frozen=True)
class Candidates:
    """This rank's part of the users that stand for all of the global batch in SC-MIM.

    Attributes:
        size: the most candidates that a domain has.
        slot_C: user · D + domain of the candidates that are on this rank.
        place_C: domain · size + position in the domain's list, which is the same on all ranks.

    Example: two domains, up to three candidates each, and the two users of this rank. The first
    user is second of the first domain's list, and both are in the second domain's:

        size       3
        slot_C     tensor([0, 1, 3])
        place_C    tensor([1, 3, 5])
    """

    size: int
    slot_C: Tensor
    place_C: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Some of a batch's users, whose activations are in memory together.

    Its views number interactions from its own first one on, and users likewise.

    Attributes:
        users: B.
        first_interaction: of the batch's interactions, the first that is the micro-batch's.
        interactions: N.
        cross: the cross-domain view.
        single: the single-domain view.
    """

    users: int
    first_interaction: int
    interactions: int
    cross: View
    single: View


@dataclass(frozen=True)
class Batch:
    """Users of one rank in one training step.

    The head of syncrec/batch/build.py draws an example. With gradient accumulation the users are
    in several micro-batches, one after the other; otherwise in one, whose views are `cross` and
    `single`.

    Attributes:
        distinct: rows of M to look up, each once, rising (U,). Empty where every user only fills
            up the batch (`without_look_up`).
        inverse: which of `distinct` the N interactions are, and behind them the negatives.
        interactions: N.
        negatives: how many negatives each interaction has for itself: those of interaction i are
            uses N + i · n to N + (i + 1) · n − 1. None where targets of a domain share negatives.
        negative_starts: where each domain's shared negatives begin among the negatives, and their
            number; D + 1 numbers, empty where none are shared.
        domain_items: items of each domain, for the correction of the sampled softmax.
        weight_B: 1, or 0 for a user that only fills up the batch.
        micro_batches: the views of all users, in order.
        candidates: users that stand for all in SC-MIM; None where all of the global batch do.
    """

    distinct: Tensor
    inverse: Tensor
    interactions: int
    negatives: int | None
    negative_starts: tuple[int, ...]
    domain_items: tuple[int, ...]
    weight_B: Tensor
    micro_batches: tuple[MicroBatch, ...]
    candidates: Candidates | None = None

    @property
    def cross(self) -> View:
        """The cross-domain view of a batch that is one micro-batch."""
        (micro_batch,) = self.micro_batches
        return micro_batch.cross

    @property
    def single(self) -> View:
        """The single-domain view of a batch that is one micro-batch."""
        (micro_batch,) = self.micro_batches
        return micro_batch.single

    @property
    def ids(self) -> Tensor:
        """Rows of M of the N interactions, then of the negatives; 0 where none is looked up."""
        if len(self.distinct) == 0:
            return torch.zeros_like(self.inverse)
        return self.distinct[self.inverse]

    def gather_vectors(self, rows_UR: Tensor) -> Tensor:
        """The vectors of interactions and negatives, (N + negatives, r), from those of `distinct`."""
        if len(self.distinct) == 0:
            return rows_UR.new_zeros(len(self.inverse), rows_UR.shape[1])
        return rows_UR.index_select(0, self.inverse)

    def reduce_gradient(self, gradient_NR: Tensor) -> Tensor:
        """The gradient of `distinct`'s vectors, (U, r): the sum of that of all their uses.

        gradient_NR: of the interactions' and the negatives' vectors, (N + negatives, r).
        """
        gradient_UR = gradient_NR.new_zeros(
            len(self.distinct), gradient_NR.shape[1]
        )
        if len(self.distinct) == 0:
            return gradient_UR
        return gradient_UR.index_add_(0, self.inverse, gradient_NR)

    def pin_memory(self) -> "Batch":
        """Copies the batch to pinned memory; a DataLoader calls this."""
        return map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True)
class Query:
    """Histories to be continued, for inference: views with SOS and every item of each history.

    Each sequence's newest token predicts for the time of the request. `build_query` in
    syncrec/batch/build.py draws an example.

    Attributes:
        ids: rows of M to look up: the N inputs, then whatever the caller wants scored.
        interactions: N.
        cross: the cross-domain view.
        newest_B: the newest token of each user in it.
        single: the view of every user's history in every domain, many of which are empty; None
            where the cross-domain view alone was asked for.
        newest_DB: the newest token of each domain and user in it, or None.
    """

    ids: Tensor
    interactions: int
    cross: View
    newest_B: Tensor
    single: View | None = None
    newest_DB: Tensor | None = None


def move(value: _Packed, device: torch.device | str) -> _Packed:
    """The same dataclass with its tensors on `device`, int32 widened to int64.

    From pinned memory the copies are asynchronous.
    """

    def move_tensor(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        if tensor.dtype == torch.int32:
            return tensor.long()
        return tensor

    return map_tensors(value, move_tensor)


def map_tensors(
    value: _Packed, function: Callable[[Tensor], Tensor]
) -> _Packed:
    """The same dataclass with function(tensor) for each tensor.

    So for those of inner dataclasses, and of tuples of dataclasses.
    """
    changed: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = map_tensors(
                cast("DataclassInstance", item), function
            )
        elif isinstance(item, tuple) and item and is_dataclass(item[0]):
            changed[field.name] = tuple(
                map_tensors(inner, function) for inner in item
            )
    return replace(value, **changed)


def drop_lookup(batch: Batch) -> Batch:
    """A batch whose users all only fill up: no row is looked up, `vectors_of_uses` gives zeros."""
    no_rows = batch.distinct[:0]
    return replace(
        batch, distinct=no_rows, inverse=torch.zeros_like(batch.inverse)
    )
