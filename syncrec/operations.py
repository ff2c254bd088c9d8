"""Floating-point operations of one training step, by formula. A multiply-add counts as two.

An expert of `blocks` blocks takes for each token of a sequence

    Q, K, V: 3 r²    out: r²    feed-forward: 2 r h
    (multiply-adds a block: 6 r² with h = r, 12 r² in two blocks)
    attention: 2 r for each pair of a token and one it sees

a GRU takes 6 r² a layer, and backward takes twice the forward. Forward runs all K experts in both
views; backward runs experts 1..j in the cross-domain view and the K − j others in the single-domain
view (equations 2 and 4), or all in both without stop-gradient. Gates (K r a token), towers (2 r h)
and scores (r each) have their backward everywhere. The mixtures of experts, SC-MIM and everything
that works element by element are left out: below 1 % together. So are the passes of Shapley values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from syncrec.batch.views import Batch, View
    from syncrec.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """One view: its tokens, the (token, seen token) pairs of its attention, how many experts
    have their backward there, and the scores of negatives that its targets need.
    """

    tokens: int
    pairs: int
    live: int
    scores: int


def step_operations(config: "ModelConfig", works: list[Work]) -> int:
    """Operations of a step: forward, backward, no optimizer (which multiplies no matrices)."""
    dim = config.dim
    tower = 2 * dim * config.ffn_dim if config.tower else 0
    total = 0
    for work in works:
        expert = config.blocks * _block_operations(config, work)
        task = work.tokens * (config.experts * dim + tower)
        task += work.scores * dim
        passes = config.experts + 2 * work.live
        total += passes * expert + 3 * task
    return 2 * total


def _block_operations(config: "ModelConfig", work: Work) -> int:
    """Multiply-adds of a block, or of a GRU's layer, forward."""
    dim = config.dim
    if config.encoder == "gru":
        return work.tokens * 6 * dim * dim
    projections = 4 * dim * dim + 2 * dim * config.ffn_dim
    return work.tokens * projections + work.pairs * 2 * dim


def packed_work(
    config: "ModelConfig", batch: "Batch", square: bool = False
) -> list[Work]:
    """The views of a packed `syncrec.batch.build.Batch` on the host, of each micro-batch.

    What backward computes anew of micro-batches is not counted: it is not the model's.
    square: count attention as a kernel that computes each bucket's whole square does, instead
    of what is needed: n (n + 1) / 2 pairs for a sequence of n tokens.
    """
    cross_live = config.experts
    single_live = config.experts
    if config.stop_gradient is True:
        cross_live = config.cross_experts
        single_live = config.experts - config.cross_experts
    works = []
    for micro_batch in batch.micro_batches:
        works.append(_view_work(batch, micro_batch.cross, cross_live, square))
        if config.tasks == "both":
            works.append(
                _view_work(batch, micro_batch.single, single_live, square)
            )
    return works


def _view_work(
    batch: "Batch",
    view: "View",
    live: int,
    square: bool,
) -> Work:
    pairs = 0
    if square:
        for sequences, length in view.attention.shapes:
            pairs += sequences * length * length
    else:
        lengths = view.sequence_M.bincount()
        pairs = int((lengths * (lengths + 1) // 2).sum())
    targets_D = _lengths(view.target_starts)
    shared_D = _lengths(batch.negative_starts)
    scores = count_scores(targets_D, batch.negatives, shared_D)
    return Work(len(view.input_M), pairs, live, scores)


def _lengths(starts: Sequence[int]) -> list[int]:
    """The lengths of jagged rows from their offsets."""
    return [end - start for start, end in pairwise(starts)]


def count_scores(
    targets_D: Sequence[int],
    own: int | None,
    shared_D: Sequence[int],
) -> int:
    """Scores of negatives: each target's own, or as many as its domain shares.

    targets_D: targets of each domain. own: negatives of each target; None where they are shared.
    """
    if own is not None:
        return own * sum(targets_D)
    scores = 0
    for targets, shared in zip(targets_D, shared_D, strict=True):
        scores += targets * shared
    return scores


def count_slots(config: "ModelConfig", batch: "Batch") -> tuple[int, int]:
    """A batch's tokens in all views, and the slots in which they lie padded (AttentionLayout).

    Example: three sequences of 3, 1 and 2 tokens in one bucket are 6 tokens in 9 slots.
    """
    views = []
    for micro_batch in batch.micro_batches:
        views.append(micro_batch.cross)
        if config.tasks == "both":
            views.append(micro_batch.single)
    tokens = 0
    slots = 0
    for view in views:
        tokens += len(view.input_M)
        for sequences, length in view.attention.shapes:
            slots += sequences * length
    return tokens, slots
