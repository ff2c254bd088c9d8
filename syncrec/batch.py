"""A batch as the model sees it: both views of every user, packed, without one padded token.

A user's history x_1 … x_n (oldest first) becomes, as in Fig. 2 of the paper,

- one cross-domain sequence   SOS, x_1, …, x_{n-1}                  whose token t predicts x_t, and
- per domain d a compact one  SOS, those of x_1 … x_{n-1} in d      whose tokens predict the user's items of d.

Of each sequence the newest `max_length` tokens are kept. Both views therefore run over the same input items and predict
the same interactions, and an interaction that keeps its predictor in both is *comparable*: the negative transfer gap is
taken over those.

Sizes: B users, N interactions, D domains, M tokens of a view, S sequences of a view, L targets of a view, P padded slots
of the attention, r embedding width. Everything here is built by NumPy in a loader's worker process; sizes that the model
needs on the host (offsets, bucket shapes) are Python integers, so that reading them never waits for a device.
"""

from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class AttentionLayout:
    """How packed tokens are laid out in buckets of right-padded sequences of similar length.

    shapes: (sequences, padded length) of each bucket. pad_P: the token that each padded slot shows (a padded slot repeats
    its sequence's last token: under a causal mask no real token sees it). unpad_M: the slot of each token.
    """

    shapes: tuple[tuple[int, int], ...]
    pad_P: torch.Tensor
    unpad_M: torch.Tensor


@dataclass(frozen=True)
class View:
    """One packed set of sequences: the cross-domain view, or the single-domain view sorted by domain, then user.

    input_M: 0 for SOS, else 1 + the interaction that is the token's input. position_M: distance from the sequence's newest
    token. sequence_M: its sequence; lengths_S on the host. task_starts: where each task's tokens begin (cross: one task,
    single: one a domain) and M. Targets, sorted by their domain (target_starts, D + 1 offsets): the predicting token,
    the interaction predicted, its domain, its user's weight, and whether the other view predicts it too.
    pool_token, pool_slot: the tokens that stand for slot user · D + domain in SC-MIM.
    """

    input_M: torch.Tensor
    position_M: torch.Tensor
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
class Batch:
    """Users of one rank in one training step.

    ids: rows of M to look up: the N interactions, then the negatives. negatives: how many each interaction has of its own
    (rows N + i · n …), or None where a domain's targets share negative_starts[d] … negative_starts[d + 1] of the rest.
    domain_items: items of each domain, for the softmax correction. weight_B: 1, or 0 for a user that only fills up.
    """

    ids: torch.Tensor
    interactions: int
    negatives: int | None
    negative_starts: tuple[int, ...]
    domain_items: tuple[int, ...]
    weight_B: torch.Tensor
    cross: View
    single: View

    def pin_memory(self):
        """The same batch in pinned memory (a DataLoader calls this)."""
        return _map_tensors(self, torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Query:
    """Histories to be continued: the cross-domain view with SOS and every item, and each user's newest token.

    ids: rows of M to look up: the N inputs, then whatever the caller wants scored.
    """

    ids: torch.Tensor
    interactions: int
    cross: View
    newest_B: torch.Tensor


def move(value, device):
    """The same dataclass with its tensors on `device` (asynchronously from pinned memory)."""
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def _map_tensors(value, function):
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, torch.Tensor):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = _map_tensors(item, function)
    return replace(value, **changed)


def trim(items_N, lengths_B, domain_N, max_length):
    """Leaves out interactions that no view of `max_length` tokens reaches: those not among the newest max_length + 1 of
    the user's own in their domain (and so not of the merged history either). Returns the three arrays anew."""
    if lengths_B.size == 0 or lengths_B.max() <= max_length + 1:
        return items_N, lengths_B, domain_N
    user_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    order, group_lengths, _ = _by_domain(user_N, domain_N, len(lengths_B))
    keep_N = np.empty(len(items_N), bool)
    keep_N[order] = _from_end(group_lengths) <= max_length
    return items_N[keep_N], np.bincount(user_N[keep_N], minlength=len(lengths_B)), domain_N[keep_N]


def build_batch(items_N, lengths_B, domain_N, weight_B, negatives, domain_items, max_length, pooling="mean"):
    """The packed views of one rank's users.

    items_N: int64 rows of M, user after user, oldest first; lengths_B: int64; domain_N: int64; weight_B: 0 or 1.
    negatives: int64 (N, n), each target's own, or a list of D int64 arrays shared by a domain's targets.
    Call `trim` first; negatives belong to the trimmed interactions.
    """
    domains, users = len(domain_items), len(lengths_B)
    user_N = np.repeat(np.arange(users), lengths_B)
    newest_N = _from_end(lengths_B) == 0

    cross = _tokens(np.arange(len(items_N)), lengths_B, np.ones(users, bool), max_length)
    order, group_lengths, group_domain = _by_domain(user_N, domain_N, users)
    newest_in_group = order[np.cumsum(group_lengths) - 1]
    single = _tokens(order, group_lengths, newest_N[newest_in_group], max_length)

    predicted = np.zeros((2, len(items_N)), bool)
    for row, tokens in zip(predicted, (cross, single), strict=True):
        row[tokens.target_M[tokens.target_M >= 0]] = True
    comparable_N = predicted.all(axis=0)

    group_starts = np.searchsorted(group_domain, np.arange(domains + 1))
    token_starts = np.concatenate([[0], np.cumsum(single.lengths_S)])[group_starts]

    def view(tokens, task_starts):
        target = np.flatnonzero(tokens.target_M >= 0)
        target_domain = domain_N[tokens.target_M[target]]
        by_domain = np.argsort(target_domain, kind="stable")
        target = target[by_domain]
        interaction = tokens.target_M[target]
        pool_token, pool_slot = _pool(tokens, user_N, domain_N, domains, pooling)
        return View(
            input_M=torch.from_numpy(tokens.input_M),
            position_M=torch.from_numpy(tokens.position_M),
            sequence_M=torch.from_numpy(tokens.sequence_M),
            sequences=len(tokens.lengths_S),
            task_starts=tuple(int(start) for start in task_starts),
            target_token_L=torch.from_numpy(target),
            target_interaction_L=torch.from_numpy(interaction),
            target_domain_L=torch.from_numpy(target_domain[by_domain]),
            target_weight_L=torch.from_numpy(weight_B.astype(np.float32)[user_N[interaction]]),
            comparable_L=torch.from_numpy(comparable_N[interaction]),
            target_starts=tuple(int(s) for s in np.searchsorted(target_domain[by_domain], np.arange(domains + 1))),
            pool_token=torch.from_numpy(pool_token),
            pool_slot=torch.from_numpy(pool_slot),
            attention=attention_layout(tokens.lengths_S),
        )

    if isinstance(negatives, list):
        own, negative_ids = None, np.concatenate(negatives)
        negative_starts = np.concatenate([[0], np.cumsum([len(rows) for rows in negatives])])
    else:
        own, negative_ids, negative_starts = negatives.shape[1], negatives.reshape(-1), ()
    return Batch(
        ids=torch.from_numpy(np.concatenate([items_N, negative_ids])),
        interactions=len(items_N),
        negatives=own,
        negative_starts=tuple(int(start) for start in negative_starts),
        domain_items=tuple(int(items) for items in domain_items),
        weight_B=torch.from_numpy(weight_B.astype(np.float32)),
        cross=view(cross, (0, len(cross.input_M))),
        single=view(single, token_starts),
    )


def build_query(items_N, lengths_B, max_length, extra_ids):
    """The cross-domain view of whole histories, to predict what comes next; arguments as for `build_batch`.

    extra_ids: int64 rows that are looked up together with the inputs (candidates).
    """
    items_N, lengths_B = _newest(items_N, lengths_B, max_length)
    tokens = _tokens(np.arange(len(items_N)), lengths_B, np.zeros(len(lengths_B), bool), max_length)
    empty = torch.zeros(0, dtype=torch.int64)
    view = View(
        input_M=torch.from_numpy(tokens.input_M),
        position_M=torch.from_numpy(tokens.position_M),
        sequence_M=torch.from_numpy(tokens.sequence_M),
        sequences=len(tokens.lengths_S),
        task_starts=(0, len(tokens.input_M)),
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
    return Query(
        ids=torch.from_numpy(np.concatenate([items_N, extra_ids])),
        interactions=len(items_N),
        cross=view,
        newest_B=torch.from_numpy(np.cumsum(tokens.lengths_S) - 1),
    )


def attention_layout(lengths_S):
    """Buckets sequences of similar length, longest first, so that a padded slot is rare (see AttentionLayout)."""
    starts_S = np.cumsum(lengths_S) - lengths_S
    order = np.argsort(-lengths_S, kind="stable")[: np.count_nonzero(lengths_S)]  # nothing to show of an empty one
    falling = -lengths_S[order]
    shapes, pads, unpad_M = [], [], np.empty(int(lengths_S.sum()), np.int64)
    begin, slots = 0, 0
    while begin < len(order):
        longest = int(-falling[begin])
        shortest = longest - max(8, longest // 4)
        end = int(np.searchsorted(falling, -shortest, side="left"))
        bucket = order[begin:end]
        step = np.arange(longest)
        real = step < lengths_S[bucket][:, None]
        grid = starts_S[bucket][:, None] + np.minimum(step, lengths_S[bucket][:, None] - 1)
        unpad_M[grid[real]] = slots + np.flatnonzero(real)
        shapes.append((len(bucket), longest))
        pads.append(grid.reshape(-1))
        slots += grid.size
        begin = end
    pad_P = np.concatenate(pads) if pads else np.empty(0, np.int64)
    return AttentionLayout(tuple(shapes), torch.from_numpy(pad_P), torch.from_numpy(unpad_M))


@dataclass(frozen=True)
class _Tokens:
    input_M: np.ndarray
    target_M: np.ndarray
    position_M: np.ndarray
    sequence_M: np.ndarray
    lengths_S: np.ndarray


def _tokens(order, group_lengths, drop_newest, max_length):
    """SOS and the items of each group as tokens, each with the next item of its group as target (-1: none); the newest item
    is no input where `drop_newest`; of each sequence the newest `max_length` tokens remain."""
    lengths = np.where(group_lengths > 0, group_lengths + 1 - drop_newest, 1 - drop_newest)
    group_M = np.repeat(np.arange(len(lengths)), lengths)
    step_M = np.arange(len(group_M)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = lengths[group_M] - 1 - step_M < max_length
    group_M, step_M = group_M[keep], step_M[keep]
    first_M = (np.cumsum(group_lengths) - group_lengths)[group_M]
    extended = np.append(order, -1)  # -1: read, but not used, by the last group's token without a target
    return _Tokens(
        input_M=np.where(step_M > 0, extended[first_M + np.maximum(step_M, 1) - 1] + 1, 0),
        target_M=np.where(step_M < group_lengths[group_M], extended[first_M + step_M], -1),
        position_M=lengths[group_M] - 1 - step_M,
        sequence_M=group_M,
        lengths_S=np.minimum(lengths, max_length),
    )


def _pool(tokens, user_N, domain_N, domains, pooling):
    token = np.flatnonzero(tokens.input_M > 0)
    interaction = tokens.input_M[token] - 1
    slot = user_N[interaction] * domains + domain_N[interaction]
    if pooling == "last":
        reverse_slot, newest = np.unique(slot[::-1], return_index=True)
        return token[len(token) - 1 - newest], reverse_slot
    return token, slot


def _by_domain(user_N, domain_N, users):
    """Interactions sorted by (domain, user), time kept; the length and domain of each such group."""
    key_N = domain_N * users + user_N
    order = np.argsort(key_N, kind="stable")
    group, lengths = np.unique(key_N, return_counts=True)
    return order, lengths, group // users


def _from_end(lengths):
    """For each element of jagged rows, how many of its row come after it."""
    return np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(int(lengths.sum()))


def _newest(items_N, lengths_B, max_length):
    keep = _from_end(lengths_B) < max_length
    return items_N[keep], np.minimum(lengths_B, max_length)
