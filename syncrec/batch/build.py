"""Packs histories into the views that the model sees (syncrec/batch/views.py).

`trim` and `build_batch` are compiled loops (syncrec/batch/compiled.py) where those can be had, and
NumPy elsewhere, in three times the time.

Sizes: B users, N interactions, D domains, G groups (one for each domain that a user has), M tokens
of a view, S sequences of a view, L targets of a view.

Example: `build_batch` of two domains of ten items, rows 0 to 9 and 10 to 19, and four users, of
whom the third has no history:

    items_N      array([3, 12, 5, 14,   15,   1, 2])
    lengths_B    array([4,               1, 0, 2])
    domain_N     array([0, 1, 0, 1,      1,   0, 0])
    weight_B     array([1, 1, 0, 1])
    negatives    [array([7, 8]), array([16])]

With max_length 4 the tensors of the batch are

    distinct               tensor([ 1,  2,  3,  5,  7,  8, 12, 14, 15, 16])
    inverse                tensor([2, 6, 3, 7,   8,   0, 1,   4, 5, 9])
    negative_starts        (0, 2, 3)

    cross.input_M                tensor([0, 1, 2, 3,   0,   0, 6])
                                         SOS, 3, 12, 5 | SOS | SOS, 1
    cross.position_M             tensor([3, 2, 1, 0,   0,   1, 0])
    cross.sequence_M             tensor([0, 0, 0, 0,   1,   3, 3])
    cross.task_starts            (0, 7)
    cross.target_token_L         tensor([0, 2, 5, 6,   1, 3, 4])
    cross.target_interaction_L   tensor([0, 2, 5, 6,   1, 3, 4])
                                         3, 5, 1, 2 of domain 0 | 12, 14, 15 of domain 1
    cross.target_starts          (0, 4, 7)

    single.input_M               tensor([0, 1, 3,   0, 6,   0, 2,   0])
                                         SOS, 3, 5 | SOS, 1 | SOS, 12 | SOS
    single.position_M            tensor([2, 1, 0,   1, 0,   1, 0,   0])
    single.sequence_M            tensor([0, 0, 0,   1, 1,   2, 2,   3])
    single.task_starts           (0, 5, 8)
    single.target_token_L        tensor([0, 1, 3, 4,   5, 6, 7])
                                         not 2: nothing of domain 0 follows 5
    single.target_interaction_L  tensor([0, 2, 5, 6,   1, 3, 4])
    single.target_starts         (0, 4, 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from syncrec.batch import compiled
from syncrec.batch.attention_layout import (
    build_attention_layout,
    sort_small,
)
from syncrec.batch.micro_batches import cut_micro_batches
from syncrec.batch.views import (
    Batch,
    MicroBatch,
    Query,
    View,
)
from syncrec.layers.time_encoding import NO_GAP, compute_gaps


def trim(
    items_N: np.ndarray,
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leaves out interactions that no view of `max_length` tokens reaches.

    Those are all but the newest max_length + 1 of a user's own in their domain: the merged history
    does not reach them either. Returns the three arrays anew.

    Example: two domains, four users, max_length 1, so two interactions a user and domain remain:

        items_N      array([7, 2, 8, 9, 3,   4,   5, 6])       array([2, 8, 9, 3,   4,   5, 6])
        lengths_B    array([5,               1, 0, 2])     →   array([4,            1, 0, 2])
        domain_N     array([0, 1, 0, 0, 1,   1,   0, 1])       array([1, 0, 0, 1,   1,   0, 1])
    """
    if lengths_B.size == 0 or lengths_B.max() <= max_length + 1:
        return items_N, lengths_B, domain_N
    domains = int(domain_N.max()) + 1
    if not compiled.why_missing():
        kept_N, kept_B = compiled.trim(
            lengths_B, domain_N, domains, max_length + 1
        )
        return items_N[kept_N], kept_B, domain_N[kept_N]
    slot_N = _number_slots(lengths_B, domain_N, domains)
    counts = np.bincount(slot_N, minlength=len(lengths_B) * domains)
    is_long = counts > max_length + 1
    if not is_long.any():
        return items_N, lengths_B, domain_N
    in_long = np.flatnonzero(is_long[slot_N])  # few
    by_slot = np.argsort(slot_N[in_long], kind="stable")
    is_old = _count_followers(counts[is_long]) > max_length
    too_old = in_long[by_slot[is_old]]
    keep_N = np.ones(len(items_N), bool)
    keep_N[too_old] = False
    users = slot_N[too_old] // domains
    left_out_B = np.bincount(users, minlength=len(lengths_B))
    return items_N[keep_N], lengths_B - left_out_B, domain_N[keep_N]


def build_batch(
    items_N: np.ndarray,
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    weight_B: np.ndarray,
    negatives: np.ndarray | list[np.ndarray],
    domain_items: Sequence[int] | np.ndarray,
    max_length: int,
    pooling: str = "mean",
    ticks_N: np.ndarray | None = None,
    accumulation: int = 1,
) -> Batch:
    """Packs both views of one rank's users; this module's head draws an example. Call `trim` first.

    items_N: rows of M, user after user, oldest first, of any integer dtype. lengths_B: int64.
    domain_N: the domain of each interaction. weight_B: 0 or 1.
    negatives: of the trimmed interactions. Each target's own, int64 (N, n), or a list of D int64
    arrays, each shared by the targets of a domain.
    pooling: which tokens stand for a user's domain in SC-MIM, "mean": all, "last": the newest.
    ticks_N: the time of each interaction; None: all at 0.
    accumulation: into how many micro-batches the users are cut.
    """
    domains = len(domain_items)
    ticks_N = _to_ticks(ticks_N, len(items_N))
    weight_B = weight_B.astype(np.float32)
    micro_batches = _build_micro_batches(
        lengths_B,
        domain_N,
        ticks_N,
        weight_B,
        domains,
        max_length,
        pooling,
        accumulation,
    )
    rows = _list_rows(items_N, negatives)
    return Batch(
        distinct=rows.distinct,
        inverse=rows.inverse,
        interactions=len(items_N),
        negatives=rows.negatives,
        negative_starts=rows.negative_starts,
        domain_items=tuple(int(items) for items in domain_items),
        weight_B=torch.from_numpy(weight_B),
        micro_batches=tuple(micro_batches),
    )


def _build_micro_batches(
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    ticks_N: np.ndarray,
    weight_B: np.ndarray,
    domains: int,
    max_length: int,
    pooling: str,
    count: int,
) -> list[MicroBatch]:
    """Both views of each micro-batch's users."""
    build_views = _build_views
    if not compiled.why_missing():
        build_views = compiled.build_views
    micro_batches = []
    first = 0
    for users in cut_micro_batches(lengths_B, count):
        end = first + int(lengths_B[users].sum())
        cross, single = build_views(
            lengths_B[users],
            domain_N[first:end],
            ticks_N[first:end],
            weight_B[users],
            domains,
            max_length,
            pooling,
        )
        micro_batch = MicroBatch(
            users=users.stop - users.start,
            first_interaction=first,
            interactions=end - first,
            cross=cross,
            single=single,
        )
        micro_batches.append(micro_batch)
        first = end
    return micro_batches


def _build_views(
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    ticks_N: np.ndarray,
    weight_B: np.ndarray,
    domains: int,
    max_length: int,
    pooling: str,
) -> tuple[View, View]:
    """`compiled.build_views` by NumPy; some of the integers are int64."""
    groups = _group_by_domain(lengths_B, domain_N, domains)
    cross_tokens = _pack_tokens(
        None, lengths_B, np.ones(len(lengths_B), bool), max_length
    )
    holds_newest = _find_newest(lengths_B, groups)
    single_tokens = _pack_tokens(
        groups.order_N, groups.lengths_G, holds_newest, max_length
    )
    cross_targets = _find_cross_targets(cross_tokens, lengths_B, groups)
    single_targets = _find_single_targets(single_tokens, holds_newest, groups)
    weight_N = None
    if not weight_B.all():
        weight_N = np.repeat(weight_B, lengths_B)
    interactions = _Interactions(groups.slot_N, ticks_N, weight_N, pooling)
    cross = _build_view(
        cross_tokens, cross_targets, single_targets.predicted_N, interactions
    )
    single = _build_view(
        single_tokens, single_targets, cross_targets.predicted_N, interactions
    )
    return cross, single


def build_query(
    items_N: np.ndarray,
    lengths_B: np.ndarray,
    max_length: int,
    extra_ids: np.ndarray,
    domain_N: np.ndarray | None = None,
    domains: int = 0,
    ticks_N: np.ndarray | None = None,
    now_B: np.ndarray | None = None,
) -> Query:
    """Packs whole histories for inference, to predict what comes next.

    items_N, lengths_B, ticks_N: as for `build_batch`. extra_ids: int64 rows that are looked up
    together with the inputs (candidates). domain_N, domains: given for the single-domain view as
    well. now_B: the tick of each request; None: 0.

    Example: two domains, four users, of whom the third has no history, max_length 4:

        items_N      array([3, 12, 5, 14,   15,   1, 2])
        lengths_B    array([4,               1, 0, 2])
        domain_N     array([0, 1, 0, 1,      1,   0, 0])
        extra_ids    array([7])

        ids               tensor([3, 12, 5, 14,   15,   1, 2,   7])
        cross.input_M     tensor([1, 2, 3, 4,   0, 5,   0,   0, 6, 7])
                                  3, 12, 5, 14 | SOS, 15 | SOS | SOS, 1, 2
        newest_B          tensor([3, 5, 6, 9])
        single.input_M    tensor([0, 1, 3,   0,   0,   0, 6, 7,     0, 2, 4,   0, 5,   0,   0])
                                  domain 0: SOS, 3, 5 | SOS | SOS | SOS, 1, 2, then domain 1
        newest_DB         tensor([[2, 3, 4, 7], [10, 12, 13, 14]])
    """
    users = len(lengths_B)
    kept_N = np.arange(len(items_N))
    if domain_N is None:
        kept_N, lengths_B = _keep_newest(kept_N, lengths_B, max_length)
    else:
        kept_N, lengths_B, domain_N = trim(
            kept_N, lengths_B, domain_N, max_length
        )
    ticks_N = _to_ticks(ticks_N, len(items_N))[kept_N]
    now_B = _to_ticks(now_B, users)
    items_N = items_N[kept_N]
    tokens = _pack_tokens(None, lengths_B, np.zeros(users, bool), max_length)
    cross = _build_query_view(tokens, (0, len(tokens.input_M)), ticks_N, now_B)
    newest_B = tokens.ends_S - 1
    single = None
    newest_DB = None
    if domain_N is not None:
        tokens = _pack_every_domain(lengths_B, domain_N, domains, max_length)
        single, newest_DB = _build_single_query(tokens, domains, ticks_N, now_B)
    ids = np.concatenate([items_N, extra_ids], dtype=np.int64)
    return Query(
        ids=torch.from_numpy(ids),
        interactions=len(items_N),
        cross=cross,
        newest_B=torch.from_numpy(newest_B),
        single=single,
        newest_DB=newest_DB,
    )


def _build_single_query(
    tokens: "_Tokens",
    domains: int,
    ticks_N: np.ndarray,
    now_B: np.ndarray,
) -> tuple[View, torch.Tensor]:
    """The single-domain view of a query, and newest_DB. tokens: of `_pack_every_domain`."""
    users = len(now_B)
    ends_DB = tokens.ends_S.reshape(domains, users)
    starts = (0, *ends_DB[:, -1].tolist())
    now_S = np.tile(now_B, domains)
    view = _build_query_view(tokens, starts, ticks_N, now_S)
    return view, torch.from_numpy(ends_DB - 1)


@dataclass(frozen=True)
class _Groups:
    """Interactions by (domain, user), and within a group by time.

    order_N: the interactions, group after group. lengths_G: interactions of each group. slot_G:
    user · D + domain of each group, slot_N: of each interaction. starts: the first group of each
    domain, and G.
    """

    slot_N: np.ndarray
    order_N: np.ndarray
    lengths_G: np.ndarray
    slot_G: np.ndarray
    starts: np.ndarray
    domains: int


def _group_by_domain(
    lengths_B: np.ndarray, domain_N: np.ndarray, domains: int
) -> _Groups:
    users = len(lengths_B)
    slot_N = _number_slots(lengths_B, domain_N, domains)
    counts_BD = np.bincount(slot_N, minlength=users * domains).reshape(
        users, domains
    )
    counts_DB = np.ascontiguousarray(counts_BD.T)
    domain_G, user_G = np.nonzero(counts_DB)
    groups_D = np.count_nonzero(counts_DB, axis=1)
    return _Groups(
        slot_N=slot_N,
        order_N=sort_small(domain_N, domains),
        lengths_G=counts_DB[domain_G, user_G],
        slot_G=user_G * domains + domain_G,
        starts=_with_zero(np.cumsum(groups_D)),
        domains=domains,
    )


def _find_newest(lengths_B: np.ndarray, groups: _Groups) -> np.ndarray:
    """Whether each group holds its user's newest interaction, bool (G,)."""
    newest_B = np.cumsum(lengths_B) - 1
    newest_G = groups.order_N[np.cumsum(groups.lengths_G) - 1]
    return newest_B[groups.slot_G // groups.domains] == newest_G


@dataclass(frozen=True)
class _Tokens:
    """Packed sequences. target_M: the interaction that each token predicts, −1: none.

    input_M, position_M, sequence_M: as in `View`. lengths_S, ends_S: tokens of each sequence, and
    the first token behind it.
    """

    input_M: np.ndarray
    target_M: np.ndarray
    position_M: np.ndarray
    sequence_M: np.ndarray
    lengths_S: np.ndarray
    ends_S: np.ndarray

    def compute_times(
        self, ticks_N: np.ndarray, default: np.ndarray | np.int32
    ) -> tuple[np.ndarray, np.ndarray]:
        """target_time_M and gap_M of a `View`, int32 (M,).

        default: the tick for which a token without a target predicts, one for all or one each.
        """
        target_ticks = np.append(ticks_N, np.int32(0))
        input_ticks = np.append(np.int32(0), ticks_N)
        time_M = np.where(
            self.target_M >= 0, target_ticks[self.target_M], default
        )
        since_M = time_M - input_ticks[self.input_M]
        gap_M = np.where(
            self.input_M > 0, compute_gaps(since_M), np.int32(NO_GAP)
        )
        return time_M, gap_M


def _pack_tokens(
    order_N: np.ndarray | None,
    lengths_G: np.ndarray,
    drop_newest: np.ndarray,
    max_length: int,
) -> _Tokens:
    """SOS and the items of each group as tokens, each with the next item of its group as target.

    The newest item is no input where `drop_newest`, bool (G,). Of each sequence the newest
    `max_length` tokens remain. order_N: the interactions, group after group; None: they lie so.
    """
    lengths = np.where(
        lengths_G > 0, lengths_G + 1 - drop_newest, 1 - drop_newest
    )
    lengths_S = np.minimum(lengths, max_length)
    ends_S = np.cumsum(lengths_S)
    first_S = np.cumsum(lengths_G) - lengths_G
    index_M = np.arange(int(lengths_S.sum()), dtype=np.int32)
    position_M = np.repeat((ends_S - 1).astype(np.int32), lengths_S)
    position_M -= index_M
    target_M = np.repeat(
        (first_S + lengths - ends_S).astype(np.int32), lengths_S
    )
    # In `order_N`. A token without a target gets the next group's first for now, or none.
    target_M += index_M
    if order_N is not None:
        order_N = np.append(order_N.astype(np.int32), np.int32(-1))
        target_M = order_N[target_M]
    # A token's input is the target of the one before it. A sequence's first is SOS, or what came
    # before the tokens that remain.
    input_M = np.empty_like(target_M)
    input_M[:1] = 0
    np.add(target_M[:-1], 1, out=input_M[1:])
    filled_S = lengths_S > 0
    begin_S = (ends_S - lengths_S)[filled_S]
    before_S = (first_S + lengths - lengths_S - 1)[filled_S]
    before_S = np.where((lengths > max_length)[filled_S], before_S, -1)
    if order_N is not None:
        before_S = np.where(before_S < 0, -1, order_N[before_S])
    input_M[begin_S] = 1 + before_S
    target_M[ends_S[~drop_newest] - 1] = -1
    return _Tokens(
        input_M=input_M,
        target_M=target_M,
        position_M=position_M,
        sequence_M=np.repeat(
            np.arange(len(lengths), dtype=np.int32), lengths_S
        ),
        lengths_S=lengths_S,
        ends_S=ends_S,
    )


def _pack_every_domain(
    lengths_B: np.ndarray, domain_N: np.ndarray, domains: int, max_length: int
) -> _Tokens:
    """A sequence for each domain and user, empty histories too: SOS alone."""
    users = len(lengths_B)
    user_N = np.repeat(np.arange(users), lengths_B)
    group_N = domain_N.astype(np.int64) * users + user_N
    lengths_G = np.bincount(group_N, minlength=domains * users)
    order_N = np.argsort(group_N, kind="stable")
    return _pack_tokens(
        order_N, lengths_G, np.zeros(len(lengths_G), bool), max_length
    )


@dataclass(frozen=True)
class _Targets:
    """What a view's tokens predict, by domain, then user.

    starts: where each domain's targets begin, and L. task_starts: where each task's tokens begin,
    and M. predicted_N: whether the view predicts an interaction.
    """

    token_L: np.ndarray
    interaction_L: np.ndarray
    starts: np.ndarray
    task_starts: tuple[int, ...]
    predicted_N: np.ndarray


def _find_cross_targets(
    tokens: _Tokens, lengths_B: np.ndarray, groups: _Groups
) -> _Targets:
    """In the cross-domain view every token has a target; a history longer than it loses its first."""
    interactions = len(groups.order_N)
    cut_N = _index_first_of_rows(lengths_B, lengths_B - tokens.lengths_S)
    predicted_N = np.ones(interactions, bool)
    predicted_N[cut_N] = False
    if len(cut_N):
        in_order_N = predicted_N[groups.order_N]
        interaction_L = groups.order_N[in_order_N]
        token_N = np.cumsum(predicted_N) - 1
        token_L = token_N[interaction_L]
        starts_N = _with_zero(np.cumsum(in_order_N))
    else:
        interaction_L = groups.order_N
        token_L = groups.order_N.copy()
        starts_N = np.arange(interactions + 1)
    first_of_domain = _with_zero(np.cumsum(groups.lengths_G))[groups.starts]
    return _Targets(
        token_L=token_L,
        interaction_L=interaction_L,
        starts=starts_N[first_of_domain],
        task_starts=(0, len(tokens.input_M)),
        predicted_N=predicted_N,
    )


def _find_single_targets(
    tokens: _Tokens, holds_newest: np.ndarray, groups: _Groups
) -> _Targets:
    """In the single-domain view a sequence's last token has no target, unless the group
    `holds_newest` of its user (G,)."""
    without_S = np.flatnonzero(~holds_newest)
    has_target_M = np.ones(len(tokens.target_M), bool)
    has_target_M[tokens.ends_S[without_S] - 1] = False
    token_L = np.flatnonzero(has_target_M)
    token_starts = _with_zero(tokens.ends_S)[groups.starts]
    targets_G = tokens.lengths_S - ~holds_newest
    cut_G = _index_first_of_rows(groups.lengths_G, groups.lengths_G - targets_G)
    predicted_N = np.ones(len(groups.order_N), bool)
    predicted_N[groups.order_N[cut_G]] = False
    return _Targets(
        token_L=token_L,
        interaction_L=tokens.target_M[token_L],
        starts=token_starts - np.searchsorted(without_S, groups.starts),
        task_starts=tuple(token_starts.tolist()),
        predicted_N=predicted_N,
    )


@dataclass(frozen=True)
class _Interactions:
    """What both views have to know of the interactions. weight_N: None where every weight is 1."""

    slot_N: np.ndarray
    ticks_N: np.ndarray
    weight_N: np.ndarray | None
    pooling: str


def _build_view(
    tokens: _Tokens,
    targets: _Targets,
    comparable_N: np.ndarray,
    interactions: _Interactions,
) -> View:
    """comparable_N: whether the other view predicts an interaction."""
    time_M, gap_M = tokens.compute_times(interactions.ticks_N, np.int32(0))
    pool_token, pool_slot = _pool_tokens(tokens, interactions)
    if interactions.weight_N is None:
        weight_L = np.ones(len(targets.token_L), np.float32)
    else:
        weight_L = interactions.weight_N[targets.interaction_L]
    domains = np.arange(len(targets.starts) - 1, dtype=np.int32)
    domain_L = np.repeat(domains, np.diff(targets.starts))
    return View(
        input_M=torch.from_numpy(tokens.input_M),
        position_M=torch.from_numpy(tokens.position_M),
        target_time_M=torch.from_numpy(time_M),
        gap_M=torch.from_numpy(gap_M),
        sequence_M=torch.from_numpy(tokens.sequence_M),
        sequences=len(tokens.lengths_S),
        task_starts=targets.task_starts,
        target_token_L=torch.from_numpy(targets.token_L),
        target_interaction_L=torch.from_numpy(targets.interaction_L),
        target_domain_L=torch.from_numpy(domain_L),
        target_weight_L=torch.from_numpy(weight_L),
        comparable_L=torch.from_numpy(comparable_N[targets.interaction_L]),
        target_starts=tuple(targets.starts.tolist()),
        pool_token=torch.from_numpy(pool_token),
        pool_slot=torch.from_numpy(pool_slot),
        attention=build_attention_layout(tokens.lengths_S),
    )


def _build_query_view(
    tokens: _Tokens,
    task_starts: tuple[int, ...],
    ticks_N: np.ndarray,
    now_S: np.ndarray,
) -> View:
    """A view without targets, whose newest tokens predict for the tick of the request."""
    empty = torch.zeros(0, dtype=torch.int64)
    time_M, gap_M = tokens.compute_times(ticks_N, now_S[tokens.sequence_M])
    return View(
        input_M=torch.from_numpy(tokens.input_M),
        position_M=torch.from_numpy(tokens.position_M),
        target_time_M=torch.from_numpy(time_M),
        gap_M=torch.from_numpy(gap_M),
        sequence_M=torch.from_numpy(tokens.sequence_M),
        sequences=len(tokens.lengths_S),
        task_starts=task_starts,
        target_token_L=empty,
        target_interaction_L=empty,
        target_domain_L=empty,
        target_weight_L=empty.float(),
        comparable_L=empty.bool(),
        target_starts=(),
        pool_token=empty,
        pool_slot=empty,
        attention=build_attention_layout(tokens.lengths_S),
    )


@dataclass(frozen=True)
class _Rows:
    """Rows of M to look up, each once, and which of them each use is, as in `Batch`."""

    distinct: torch.Tensor
    inverse: torch.Tensor
    negatives: int | None
    negative_starts: tuple[int, ...]


def _list_rows(
    items_N: np.ndarray, negatives: np.ndarray | list[np.ndarray]
) -> _Rows:
    if isinstance(negatives, list):
        per_interaction = None
        negative_ids = np.concatenate(negatives)
        counts = [len(rows) for rows in negatives]
        starts = (0, *np.cumsum(counts).tolist())
    else:
        per_interaction = negatives.shape[1]
        negative_ids = negatives.reshape(-1)
        starts = ()
    ids = np.concatenate([items_N, negative_ids], dtype=np.int64)
    distinct, inverse = _list_distinct(ids)
    return _Rows(distinct, inverse, per_interaction, starts)


def _list_distinct(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row once, rising, int64, and which of these each of `ids` is, int32."""
    if not compiled.why_missing():
        return compiled.list_rows(ids)
    # Less than half of np.unique's time.
    distinct, inverse = torch.unique(torch.from_numpy(ids), return_inverse=True)
    return distinct, inverse.int()


def _pool_tokens(
    tokens: _Tokens, interactions: _Interactions
) -> tuple[np.ndarray, np.ndarray]:
    """pool_token and pool_slot of a `View`."""
    token = np.flatnonzero(tokens.input_M > 0)
    slot = interactions.slot_N[tokens.input_M[token] - 1]
    if interactions.pooling == "last":
        slots, from_end = np.unique(slot[::-1], return_index=True)
        return token[len(token) - 1 - from_end], slots
    return token, slot


def _to_ticks(ticks: np.ndarray | None, count: int) -> np.ndarray:
    """Ticks as int32; None: zeros."""
    if ticks is None:
        return np.zeros(count, np.int32)
    return np.asarray(ticks).astype(np.int32)


def _number_slots(
    lengths_B: np.ndarray, domain_N: np.ndarray, domains: int
) -> np.ndarray:
    """user · D + domain of each interaction, int32 (N,)."""
    first_B = np.arange(len(lengths_B), dtype=np.int32) * np.int32(domains)
    slot_N = np.repeat(first_B, lengths_B)
    slot_N += domain_N
    return slot_N


def _with_zero(ends: np.ndarray) -> np.ndarray:
    """Offsets of jagged rows from their ends: 0 goes before them."""
    return np.concatenate([[0], ends])


def _index_first_of_rows(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices of the first `counts` elements of each jagged row; for few rows with any."""
    rows = np.flatnonzero(counts)
    starts = (np.cumsum(lengths) - lengths)[rows]
    counts = counts[rows]
    offsets = np.repeat(starts - np.cumsum(counts) + counts, counts)
    return offsets + np.arange(int(counts.sum()))


def _count_followers(lengths: np.ndarray) -> np.ndarray:
    """For each element of jagged rows, how many of its row come after it."""
    ends = np.repeat(np.cumsum(lengths), lengths)
    return ends - 1 - np.arange(int(lengths.sum()))


def _keep_newest(
    items_N: np.ndarray, lengths_B: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The newest `max_length` elements of each jagged row, and how many those are."""
    keep = _count_followers(lengths_B) < max_length
    return items_N[keep], np.minimum(lengths_B, max_length)
