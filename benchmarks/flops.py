"""Floating-point operations of one training step, by formula. A multiply-add counts as two.

An expert of `blocks` blocks takes for each token of a sequence

    Q, K, V: 3 r²    out: r²    feed-forward: 2 r h
    (multiply-adds a block: 6 r² with h = r, 12 r² in two blocks)
    attention: 2 r for each pair of a token and one it sees

and backward takes twice the forward. Forward runs all K experts in both views; backward runs
experts 1..j in the cross-domain view and the K − j others in the single-domain view (equations
2 and 4). Gates (K r a token), towers (2 r h) and scores (r each) have their backward
everywhere. The mixtures of experts, SC-MIM and everything that works element by element are
left out: below 1 % together.

The padded model does the same on more tokens: users × T in each of D + 1 views.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from benchmarks.padded import PaddedBatch
    from syncrec.batch.views import Batch
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
    inner = config.ffn_dim
    total = 0
    for work in works:
        expert = config.blocks * (
            work.tokens * (4 * dim * dim + 2 * dim * inner)
            + work.pairs * 2 * dim
        )
        task = (
            work.tokens * (config.experts * dim + 2 * dim * inner)
            + work.scores * dim
        )
        total += (config.experts + 2 * work.live) * expert + 3 * task
    return 2 * total


def packed_work(
    config: "ModelConfig", batch: "Batch", square: bool = False
) -> list[Work]:
    """The views of a packed `syncrec.batch.build.Batch`.

    square: count attention as a kernel that computes each bucket's whole square does, instead
    of what is needed: n (n + 1) / 2 pairs for a sequence of n tokens.
    """
    views = (
        (batch.cross, config.cross_experts),
        (batch.single, config.experts - config.cross_experts),
    )
    return [_packed(batch, view, live, square) for view, live in views]


def padded_work(
    config: "ModelConfig", batch: "PaddedBatch", square: bool = False
) -> list[Work]:
    """The D + 1 views of a `benchmarks.padded.PaddedBatch`, padding included: it is computed
    too.
    """
    views, users, longest = batch.input_VBT.shape
    pairs = users * (
        longest * longest if square else longest * (longest + 1) // 2
    )
    works = []
    for view in range(views):
        domains = (
            batch.target_domain_VBT[view][batch.target_VBT[view] > 0]
            .bincount(minlength=views - 1)
            .tolist()
        )
        live = (
            config.experts - config.cross_experts
            if view
            else config.cross_experts
        )
        shared = [len(rows) for rows in batch.shared_D]
        works.append(
            Work(
                users * longest,
                pairs,
                live,
                _scores(domains, batch.negatives, shared),
            )
        )
    return works


def _packed(batch, view, live, square):
    if square:
        pairs = sum(
            sequences * length * length
            for sequences, length in view.attention.shapes
        )
    else:
        lengths = view.sequence_M.bincount()
        pairs = int((lengths * (lengths + 1) // 2).sum())
    shared = np.diff(batch.negative_starts).tolist()
    return Work(
        len(view.input_M),
        pairs,
        live,
        _scores(np.diff(view.target_starts).tolist(), batch.negatives, shared),
    )


def _scores(targets_D, own, shared_D):
    """Scores of negatives: each target's own, or as many as its domain shares."""
    if own is not None:
        return own * sum(targets_D)
    return sum(
        targets * shared
        for targets, shared in zip(targets_D, shared_D, strict=True)
    )
