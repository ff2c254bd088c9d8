"""A batch as the model sees it: both views of every user, packed, without one padded token.

A user's history x_1 … x_n (oldest first) becomes, as in Fig. 2 of the paper,

- one cross-domain sequence   SOS, x_1, …, x_{n-1}                  whose token t predicts x_t, and
- per domain d a compact one  SOS, those of x_1 … x_{n-1} in d      whose tokens predict the user's items of d.

Of each sequence the newest `max_length` tokens are kept. Both views therefore run over the same input items and predict
the same interactions, and an interaction that keeps its predictor in both is *comparable*: the negative transfer gap is
taken over those.

Sizes: B users, N interactions, D domains, M tokens of a view, S sequences of a view, L targets of a view, P padded slots
of the attention, r embedding width. Everything here is built by NumPy in a loader's worker process, where int32 is half the
work; `move` makes all integers the int64 that indexing asks for. Sizes that the model needs on the host (offsets, bucket
shapes) are Python integers, so that reading them never waits for a device. Times are ticks (syncrec/layers/time_encoding.py).
"""

from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch

from syncrec.layers.time_encoding import NO_GAP, gaps

# That attention's CUDA kernels take in one call: they are a dimension of the grid (FlashAttention 2: `dim3 grid(num_m_block,
# params.b, params.h)`; the memory-efficient one: `dim3(…, num_heads, num_batches)`), and all but the first end at 65,535.
MOST_SEQUENCES = 65_535


@dataclass(frozen=True)
class AttentionLayout:
    """Where sequences begin (starts_S, S + 1 with the end), and how packed tokens are laid out in buckets of right-padded
    sequences of similar length.

    pieces: (sequences, tokens) of the parts in which a kernel takes them where it cannot take all, in order. shapes:
    (sequences, padded length) of each bucket. pad_P: the token that each padded slot shows (a padded slot repeats
    its sequence's last token: under a causal mask no real token sees it). unpad_M: the slot of each token.
    """

    starts_S: torch.Tensor
    shapes: tuple[tuple[int, int], ...]
    pad_P: torch.Tensor
    unpad_M: torch.Tensor
    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """One packed set of sequences: the cross-domain view, or the single-domain view sorted by domain, then user.

    input_M: 0 for SOS, else 1 + the interaction that is the token's input. position_M: distance from the sequence's newest
    token. asked_M: the time for which the token predicts, that of its target; 0 where it has none. gap_M: how long after its
    input that is (`syncrec.layers.time_encoding.gaps`). sequence_M: its sequence; lengths_S on the host. task_starts: where each task's tokens
    begin (cross: one task, single: one a domain) and M. Targets, sorted by their domain (target_starts, D + 1 offsets): the
    predicting token, the interaction predicted, its domain, its user's weight, and whether the other view predicts it too.
    pool_token, pool_slot: the tokens that stand for slot user · D + domain in SC-MIM.
    """

    input_M: torch.Tensor
    position_M: torch.Tensor
    asked_M: torch.Tensor
    gap_M: torch.Tensor
    sequence_M: torch.Tensor
    sequences: int
    task_starts: tuple[int, ...]
    target_token_L: torch.Tensor
    target_interaction_L: torch.Tensor
    target_domain_L: torch.Tensor
    target_weight_L: torch.Tensor
    comparable_L: torch.Tensor
    target_starts: tuple[int, ...]
    pool_token: torch.Tensor
    pool_slot: torch.Tensor
    attention: AttentionLayout


@dataclass(frozen=True)
class Candidates:
    """This rank's part of the users that stand for all of the global batch in SC-MIM, `size` a domain at most.

    slot_C: user · D + domain of those that are on this rank. place_C: domain · size + place in the domain's list, the same
    list on all ranks.
    """

    size: int
    slot_C: torch.Tensor
    place_C: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Users of one rank in one training step.

    distinct: rows of M to look up, each once, rising; place: where in it the N interactions and then the negatives are. None
    are looked up where all users only fill up (`without_look_up`).
    negatives: how many each interaction has of its own (places N + i · n …), or None where a domain's targets share
    negative_starts[d] … negative_starts[d + 1] of the rest. domain_items: items of each domain, for the softmax correction.
    weight_B: 1, or 0 for a user that only fills up. candidates: None where all users of the global batch are.
    """

    distinct: torch.Tensor
    place: torch.Tensor
    interactions: int
    negatives: int | None
    negative_starts: tuple[int, ...]
    domain_items: tuple[int, ...]
    weight_B: torch.Tensor
    cross: View
    single: View
    candidates: Candidates | None = None

    @property
    def ids(self):
        """Rows of M: the N interactions', then the negatives'; 0 where nothing is looked up."""
        return (
            self.distinct[self.place]
            if len(self.distinct)
            else torch.zeros_like(self.place)
        )

    def vectors_of_uses(self, rows_UR: torch.Tensor) -> torch.Tensor:
        """The vectors of the interactions and the negatives, (N + negatives, r), from those of `distinct`, (U, r)."""
        if not len(self.distinct):
            return rows_UR.new_zeros(len(self.place), rows_UR.shape[1])
        return rows_UR.index_select(0, self.place)

    def gradient_of_rows(self, gradient_NR: torch.Tensor) -> torch.Tensor:
        """The gradient of `distinct`'s vectors, (U, r), from that of all their uses, (N + negatives, r)."""
        gradient_UR = gradient_NR.new_zeros(len(self.distinct), gradient_NR.shape[1])
        return (
            gradient_UR.index_add_(0, self.place, gradient_NR)
            if len(self.distinct)
            else gradient_UR
        )

    def pin_memory(self):
        """The same batch in pinned memory (a DataLoader calls this)."""
        return map_tensors(self, torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Query:
    """Histories to be continued: views with SOS and every item, and each sequence's newest token, which predicts for the time
    of the request.

    ids: rows of M to look up: the N inputs, then whatever the caller wants scored. newest_B: of the cross-domain view. single,
    newest_DB: the view of every user's history in every domain, of which many are empty, where both views are asked for.
    """

    ids: torch.Tensor
    interactions: int
    cross: View
    newest_B: torch.Tensor
    single: View | None = None
    newest_DB: torch.Tensor | None = None


def move(value, device):
    """The same dataclass with its tensors on `device` (asynchronously from pinned memory), where int32 becomes int64."""

    def moved(tensor):
        tensor = tensor.to(device, non_blocking=True)
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    return map_tensors(value, moved)


def map_tensors(value, function):
    """The same dataclass with function(tensor) in each tensor's place, in the dataclasses in it too."""
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, torch.Tensor):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = map_tensors(item, function)
    return replace(value, **changed)


def trim(items_N, lengths_B, domain_N, max_length):
    """Leaves out interactions that no view of `max_length` tokens reaches: those not among the newest max_length + 1 of
    the user's own in their domain (and so not of the merged history either). Returns the three arrays anew."""
    if lengths_B.size == 0 or lengths_B.max() <= max_length + 1:
        return items_N, lengths_B, domain_N
    domains = int(domain_N.max()) + 1
    slot_N = _slots(lengths_B, domain_N, domains)
    counts = np.bincount(slot_N, minlength=len(lengths_B) * domains)
    long = counts > max_length + 1
    if not long.any():
        return items_N, lengths_B, domain_N
    in_long = np.flatnonzero(long[slot_N])  # few
    slot_L = slot_N[in_long]
    by_slot = np.argsort(slot_L, kind="stable")
    too_old = in_long[by_slot[_from_end(counts[long]) > max_length]]
    keep_N = np.ones(len(items_N), bool)
    keep_N[too_old] = False
    left_out_B = np.bincount(slot_N[too_old] // domains, minlength=len(lengths_B))
    return items_N[keep_N], lengths_B - left_out_B, domain_N[keep_N]


def build_batch(
    items_N,
    lengths_B,
    domain_N,
    weight_B,
    negatives,
    domain_items,
    max_length,
    pooling="mean",
    ticks_N=None,
):
    """The packed views of one rank's users.

    items_N: rows of M, user after user, oldest first; lengths_B: int64; domain_N; weight_B: 0 or 1; ticks_N: when they were,
    None: all at 0. Any integer dtype.
    negatives: int64 (N, n), each target's own, or a list of D int64 arrays shared by a domain's targets.
    Call `trim` first; negatives belong to the trimmed interactions.
    """
    domains, users, interactions = len(domain_items), len(lengths_B), len(items_N)
    weight_B, ticks_N = weight_B.astype(np.float32), _ticks(ticks_N, interactions)
    slot_N = _slots(lengths_B, domain_N, domains)
    order, group_lengths, group_slot, group_starts = _by_domain(
        slot_N, domain_N, users, domains
    )

    cross = _tokens(None, lengths_B, np.ones(users, bool), max_length)
    newest_B = np.cumsum(lengths_B) - 1
    newest_in_group = order[np.cumsum(group_lengths) - 1]
    holds_newest = newest_B[group_slot // domains] == newest_in_group
    single = _tokens(order, group_lengths, holds_newest, max_length)
    token_starts = np.concatenate([[0], np.cumsum(single.lengths_S)])[group_starts]

    # Each view's targets by domain, then user. In the cross-domain view every token has one; who is longer than it has not all.
    cut_N = _first_of_each(lengths_B, lengths_B - cross.lengths_S)
    in_cross_N = np.ones(interactions, bool)
    in_cross_N[cut_N] = False
    if len(cut_N):
        in_order_N = in_cross_N[order]
        cross_target = order[in_order_N]
        cross_token = (np.cumsum(in_cross_N) - 1)[cross_target]
        cross_starts = np.concatenate([[0], np.cumsum(in_order_N)])
    else:
        cross_target, cross_token, cross_starts = (
            order,
            order.copy(),
            np.arange(interactions + 1),
        )
    cross_starts = cross_starts[
        np.concatenate([[0], np.cumsum(group_lengths)])[group_starts]
    ]
    # In the others a sequence's last token has none, unless it is the user's last too.
    without_S = np.flatnonzero(~holds_newest)
    has_target_M = np.ones(len(single.target_M), bool)
    has_target_M[np.cumsum(single.lengths_S)[without_S] - 1] = False
    single_token = np.flatnonzero(has_target_M)
    single_target = single.target_M[single_token]
    single_starts = token_starts - np.searchsorted(without_S, group_starts)
    in_single_N = np.ones(interactions, bool)
    in_single_N[
        order[
            _first_of_each(
                group_lengths, group_lengths - (single.lengths_S - ~holds_newest)
            )
        ]
    ] = False
    weight_N = None if weight_B.all() else np.repeat(weight_B, lengths_B)

    def view(tokens, task_starts, target, interaction, target_starts, in_other_N):
        weight_L = (
            np.ones(len(target), np.float32)
            if weight_N is None
            else weight_N[interaction]
        )
        asked_M, gap_M = tokens.times(ticks_N, np.int32(0))
        pool_token, pool_slot = _pool(tokens, slot_N, pooling)
        return View(
            input_M=torch.from_numpy(tokens.input_M),
            position_M=torch.from_numpy(tokens.position_M),
            asked_M=torch.from_numpy(asked_M),
            gap_M=torch.from_numpy(gap_M),
            sequence_M=torch.from_numpy(tokens.sequence_M),
            sequences=len(tokens.lengths_S),
            task_starts=tuple(int(start) for start in task_starts),
            target_token_L=torch.from_numpy(target),
            target_interaction_L=torch.from_numpy(interaction),
            target_domain_L=torch.from_numpy(
                np.repeat(np.arange(domains, dtype=np.int32), np.diff(target_starts))
            ),
            target_weight_L=torch.from_numpy(weight_L),
            comparable_L=torch.from_numpy(in_other_N[interaction]),
            target_starts=tuple(target_starts.tolist()),
            pool_token=torch.from_numpy(pool_token),
            pool_slot=torch.from_numpy(pool_slot),
            attention=attention_layout(tokens.lengths_S),
        )

    if isinstance(negatives, list):
        own, negative_ids = None, np.concatenate(negatives)
        negative_starts = np.concatenate(
            [[0], np.cumsum([len(rows) for rows in negatives])]
        )
    else:
        own, negative_ids, negative_starts = (
            negatives.shape[1],
            negatives.reshape(-1),
            (),
        )
    ids = torch.from_numpy(np.concatenate([items_N, negative_ids], dtype=np.int64))
    distinct, place = torch.unique(
        ids, return_inverse=True
    )  # less than half of np.unique's time
    return Batch(
        distinct=distinct,
        place=place.int(),
        interactions=interactions,
        negatives=own,
        negative_starts=tuple(int(start) for start in negative_starts),
        domain_items=tuple(int(items) for items in domain_items),
        weight_B=torch.from_numpy(weight_B),
        cross=view(
            cross,
            (0, len(cross.input_M)),
            cross_token,
            cross_target,
            cross_starts,
            in_single_N,
        ),
        single=view(
            single, token_starts, single_token, single_target, single_starts, in_cross_N
        ),
    )


def without_look_up(batch: Batch) -> Batch:
    """A batch of users that all only fill up, of which no row is looked up: `vectors_of_uses` gives zeros."""
    return replace(
        batch, distinct=batch.distinct[:0], place=torch.zeros_like(batch.place)
    )


def build_query(
    items_N,
    lengths_B,
    max_length,
    extra_ids,
    domain_N=None,
    domains=0,
    ticks_N=None,
    now_B=None,
):
    """The cross-domain view of whole histories, to predict what comes next; arguments as for `build_batch`.

    extra_ids: int64 rows that are looked up together with the inputs (candidates). domain_N, domains: the single-domain view as
    well. now_B: the tick for which is asked; None: 0.
    """
    users, kept_N = len(lengths_B), np.arange(len(items_N))
    if domain_N is None:
        kept_N, lengths_B = _newest(kept_N, lengths_B, max_length)
    else:
        kept_N, lengths_B, domain_N = trim(kept_N, lengths_B, domain_N, max_length)
    ticks_N, now_B = _ticks(ticks_N, len(items_N))[kept_N], _ticks(now_B, users)
    items_N = items_N[kept_N]
    cross = _tokens(None, lengths_B, np.zeros(len(lengths_B), bool), max_length)
    single, newest_DB = None, None
    if domain_N is not None:
        group_N = domain_N.astype(np.int64) * users + np.repeat(
            np.arange(users), lengths_B
        )
        groups = np.bincount(group_N, minlength=domains * users)
        tokens = _tokens(
            np.argsort(group_N, kind="stable"),
            groups,
            np.zeros(len(groups), bool),
            max_length,
        )
        ends_S = np.cumsum(tokens.lengths_S)
        starts = (0, *(int(end) for end in ends_S.reshape(domains, users)[:, -1]))
        single = _asking(tokens, starts, ticks_N, np.tile(now_B, domains))
        newest_DB = torch.from_numpy(ends_S.reshape(domains, users) - 1)
    return Query(
        ids=torch.from_numpy(np.concatenate([items_N, extra_ids], dtype=np.int64)),
        interactions=len(items_N),
        cross=_asking(cross, (0, len(cross.input_M)), ticks_N, now_B),
        newest_B=torch.from_numpy(np.cumsum(cross.lengths_S) - 1),
        single=single,
        newest_DB=newest_DB,
    )


def _asking(tokens, task_starts, ticks_N, now_S):
    """A view without targets, whose newest tokens predict for now."""
    empty = torch.zeros(0, dtype=torch.int64)
    asked_M, gap_M = tokens.times(ticks_N, now_S[tokens.sequence_M])
    return View(
        input_M=torch.from_numpy(tokens.input_M),
        position_M=torch.from_numpy(tokens.position_M),
        asked_M=torch.from_numpy(asked_M),
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
        attention=attention_layout(tokens.lengths_S),
    )


def attention_layout(lengths_S):
    """Buckets sequences of similar length, longest first, so that a padded slot is rare (see AttentionLayout)."""
    starts_S = np.cumsum(lengths_S) - lengths_S
    order = _argsort(-lengths_S, int(lengths_S.max(initial=0)))
    order = order[: np.count_nonzero(lengths_S)]  # nothing to show of an empty one
    lengths, starts = lengths_S[order], starts_S[order]
    falling = -lengths
    shapes, begins = [], []
    begin, slots = 0, 0
    while begin < len(order):
        longest = int(lengths[begin])
        shortest = longest - max(8, longest // 4)
        end = int(np.searchsorted(falling, -shortest, side="left"))
        shapes.append((end - begin, longest))
        begins.append((begin, slots))
        begin, slots = end, slots + (end - begin) * longest
    pad_P, row_S = np.empty(slots, np.int32), np.zeros(len(lengths_S), np.int32)
    lengths, starts = lengths.astype(np.int32), starts.astype(np.int32)
    for (rows, longest), (begin, slot) in zip(shapes, begins, strict=True):
        bucket = slice(begin, begin + rows)
        grid = pad_P[slot : slot + rows * longest].reshape(rows, longest)
        np.minimum(
            np.arange(longest, dtype=np.int32), lengths[bucket, None] - 1, out=grid
        )
        grid += starts[bucket, None]
        row_S[order[bucket]] = slot + longest * np.arange(rows)
    unpad_M = np.repeat((row_S - starts_S).astype(np.int32), lengths_S)
    unpad_M += np.arange(len(unpad_M), dtype=np.int32)
    bounds_S = np.concatenate([[0], np.cumsum(lengths_S)], dtype=np.int32)
    firsts = np.arange(0, len(lengths_S), MOST_SEQUENCES)
    ends = np.minimum(firsts + MOST_SEQUENCES, len(lengths_S))
    tokens = bounds_S[ends] - bounds_S[firsts]
    return AttentionLayout(
        starts_S=torch.from_numpy(bounds_S),
        shapes=tuple(shapes),
        pad_P=torch.from_numpy(pad_P),
        unpad_M=torch.from_numpy(unpad_M),
        pieces=tuple(zip((ends - firsts).tolist(), tokens.tolist(), strict=True)),
    )


@dataclass(frozen=True)
class _Tokens:
    input_M: np.ndarray
    target_M: np.ndarray
    position_M: np.ndarray
    sequence_M: np.ndarray
    lengths_S: np.ndarray

    def times(self, ticks_N, otherwise):
        """asked_M and gap_M of a `View`, int32 (M,). otherwise: the tick of tokens without a target, one or one each."""
        asked_M = np.where(
            self.target_M >= 0,
            np.append(ticks_N, np.int32(0))[self.target_M],
            otherwise,
        )
        since_M = asked_M - np.append(np.int32(0), ticks_N)[self.input_M]
        return asked_M, np.where(self.input_M > 0, gaps(since_M), np.int32(NO_GAP))


def _tokens(order, group_lengths, drop_newest, max_length):
    """SOS and the items of each group as tokens, each with the next item of its group as target (-1: none); the newest item
    is no input where `drop_newest`; of each sequence the newest `max_length` tokens remain.

    order: the interactions, group after group; None: as they are.
    """
    lengths = np.where(
        group_lengths > 0, group_lengths + 1 - drop_newest, 1 - drop_newest
    )
    lengths_S = np.minimum(lengths, max_length)
    ends_S = np.cumsum(lengths_S)
    first_S = np.cumsum(group_lengths) - group_lengths
    index_M = np.arange(int(lengths_S.sum()), dtype=np.int32)
    position_M = np.repeat((ends_S - 1).astype(np.int32), lengths_S)
    position_M -= index_M
    target_M = np.repeat((first_S + lengths - ends_S).astype(np.int32), lengths_S)
    target_M += index_M  # in `order`; a token without a target gets the next group's first, or none
    if order is not None:
        order = np.append(order.astype(np.int32), np.int32(-1))
        target_M = order[target_M]
    # A token's input is the target of the one before it; a sequence's first is SOS, or what came before the tokens that remain.
    input_M = np.empty_like(target_M)
    input_M[:1] = 0
    np.add(target_M[:-1], 1, out=input_M[1:])
    there = lengths_S > 0
    begin_S = (ends_S - lengths_S)[there]
    before_S = (first_S + lengths - lengths_S - 1)[there]
    before_S = np.where((lengths > max_length)[there], before_S, -1)
    input_M[begin_S] = 1 + (
        before_S if order is None else np.where(before_S < 0, -1, order[before_S])
    )
    target_M[ends_S[~np.asarray(drop_newest, bool)] - 1] = -1
    return _Tokens(
        input_M=input_M,
        target_M=target_M,
        position_M=position_M,
        sequence_M=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths_S),
        lengths_S=lengths_S,
    )


def _pool(tokens, slot_N, pooling):
    token = np.flatnonzero(tokens.input_M > 0)
    slot = slot_N[tokens.input_M[token] - 1]
    if pooling == "last":
        reverse_slot, newest = np.unique(slot[::-1], return_index=True)
        return token[len(token) - 1 - newest], reverse_slot
    return token, slot


def _ticks(ticks, count):
    return (
        np.zeros(count, np.int32)
        if ticks is None
        else np.asarray(ticks).astype(np.int32)
    )


def _slots(lengths_B, domain_N, domains):
    """user · D + domain of each interaction."""
    slot_N = np.repeat(
        np.arange(len(lengths_B), dtype=np.int32) * np.int32(domains), lengths_B
    )
    slot_N += domain_N
    return slot_N


def _by_domain(slot_N, domain_N, users, domains):
    """Interactions sorted by (domain, user), time kept; the length and slot of each such group; each domain's first group."""
    counts_DB = np.ascontiguousarray(
        np.bincount(slot_N, minlength=users * domains).reshape(users, domains).T
    )
    domain, user = np.nonzero(counts_DB)
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(counts_DB, axis=1))])
    return (
        _argsort(domain_N, domains),
        counts_DB[domain, user],
        user * domains + domain,
        starts,
    )


def _argsort(values, below):
    """A stable order of integers of less than `below` either way from 0: short ones are sorted by counting."""
    narrow = next(
        (dtype for dtype in (np.int8, np.int16) if below <= np.iinfo(dtype).max),
        values.dtype,
    )
    return np.argsort(values.astype(narrow, copy=False), kind="stable")


def _first_of_each(lengths, counts):
    """The places of the first `counts` elements of jagged rows; for few rows with any."""
    some = np.flatnonzero(counts)
    counts, starts = counts[some], (np.cumsum(lengths) - lengths)[some]
    return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(
        int(counts.sum())
    )


def _from_end(lengths):
    """For each element of jagged rows, how many of its row come after it."""
    return np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(int(lengths.sum()))


def _newest(items_N, lengths_B, max_length):
    keep = _from_end(lengths_B) < max_length
    return items_N[keep], np.minimum(lengths_B, max_length)
