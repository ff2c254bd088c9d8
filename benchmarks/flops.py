"""Floating-point operations of the padded model's step; those of ours are syncrec/operations.py's.

The padded model does the same on more tokens: users × T in each of D + 1 views.
"""

from typing import TYPE_CHECKING

from syncrec.operations import (
    Work,
    count_scores,
    packed_work,
    step_operations,
)

if TYPE_CHECKING:
    from benchmarks.padded import PaddedBatch
    from syncrec.config import ModelConfig

__all__ = ["Work", "packed_work", "padded_work", "step_operations"]


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
                count_scores(domains, batch.negatives, shared),
            )
        )
    return works
