"""What syncrec/batch/build.py and a loader do, in compiled loops (syncrec_kernels/batch.cpp).

The results are the same to the bit: tests/unit/syncrec/batch/test_compiled.py. Where there is no
compiler, `build_batch` does without, in three times the time.

Sizes: B users, N interactions, as in syncrec/batch/build.py.
"""

from collections.abc import Sequence

import numpy as np
import torch

from syncrec.batch.attention_layout import AttentionLayout, cut_pieces
from syncrec.batch.views import View
from syncrec_kernels.build import why_unavailable

_ARRAYS_OF_VIEW = 18


def why_missing() -> str | None:
    """None where the kernel is loaded, else why it cannot be. The first call may compile it."""
    return why_unavailable("batch", "batches take three times as long to build")


def gather_histories(
    blocks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    block_B: np.ndarray,
    place_B: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Histories of users out of blocks: lengths_B, int64, items_N, int32, and ticks_N, uint16.

    blocks: (bounds, items, ticks) of each, int64, int32 and uint16, writable. User k of a block has
    the interactions from bounds[k] to bounds[k + 1]. block_B, place_B: int64.

    Example: two blocks, of two users and of one, and three users to be read:

        blocks       (array([0, 1, 3]), array([5, 7, 8]), array([1, 2, 3]))
                     (array([0, 2]), array([6, 9]), array([4, 5]))
        block_B      array([1,    0, 0])
        place_B      array([0,    1, 0])
        returns      array([2,    2, 1])
                     array([6, 9, 7, 8, 5])
                     array([4, 5, 2, 3, 1])
    """
    bounds = []
    items = []
    ticks = []
    for block_bounds, block_items, block_ticks in blocks:
        bounds.append(torch.from_numpy(block_bounds))
        items.append(torch.from_numpy(block_items))
        ticks.append(torch.from_numpy(block_ticks))
    gathered = torch.ops.batch.gather(
        bounds,
        items,
        ticks,
        torch.from_numpy(block_B),
        torch.from_numpy(place_B),
    )
    lengths_B, items_N, ticks_N = gathered
    return lengths_B.numpy(), items_N.numpy(), ticks_N.numpy()


def trim(
    lengths_B: np.ndarray, domain_N: np.ndarray, domains: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The newest `most` interactions of each user and domain.

    Returns which those are, and how many each user has of them, both int64.

    Example: two domains, four users, two interactions a user and domain:

        lengths_B    array([5,               1, 0, 2])
        domain_N     array([0, 1, 0, 0, 1,   1,   0, 1])
        returns      array([1, 2, 3, 4, 5, 6, 7]), array([4, 1, 0, 2])
    """
    kept_N, kept_B = torch.ops.batch.trim(
        _to_tensor(lengths_B, np.int64),
        _to_tensor(domain_N, np.int32),
        domains,
        most,
    )
    return kept_N.numpy(), kept_B.numpy()


def build_views(
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    ticks_N: np.ndarray,
    weight_B: np.ndarray,
    domains: int,
    max_length: int,
    pooling: str,
) -> tuple[View, View]:
    """The cross-domain view and the single-domain view; the arguments are `build_batch`'s.

    Integers are int32.
    """
    arrays = torch.ops.batch.build(
        _to_tensor(lengths_B, np.int64),
        _to_tensor(domain_N, np.int32),
        _to_tensor(ticks_N, np.int32),
        _to_tensor(weight_B, np.float32),
        domains,
        max_length,
        pooling == "last",
    )
    cross = _to_view(arrays[:_ARRAYS_OF_VIEW])
    single = _to_view(arrays[_ARRAYS_OF_VIEW:])
    return cross, single


def list_rows(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row once, rising, int64, and which of these each use is, int32.

    Example:

        rows       array([3, 12, 3, 1])
        returns    tensor([1, 3, 12]), tensor([1, 2, 1, 0])
    """
    return torch.ops.batch.list_rows(torch.from_numpy(rows))


def _to_view(arrays: list[torch.Tensor]) -> View:
    """arrays: of one view, in the order of `add_view` in syncrec_kernels/batch.cpp."""
    *fields, starts_S, pad_P, unpad_M, shapes, task_starts, target_starts = (
        arrays
    )
    attention = AttentionLayout(
        starts_S=starts_S,
        shapes=tuple(map(tuple, shapes.view(-1, 2).tolist())),
        pad_P=pad_P,
        unpad_M=unpad_M,
        pieces=cut_pieces(starts_S.numpy()),
    )
    names = (
        "input_M",
        "position_M",
        "target_time_M",
        "gap_M",
        "sequence_M",
        "target_token_L",
        "target_interaction_L",
        "target_domain_L",
        "target_weight_L",
        "comparable_L",
        "pool_token",
        "pool_slot",
    )
    return View(
        **dict(zip(names, fields, strict=True)),
        sequences=len(starts_S) - 1,
        task_starts=tuple(task_starts.tolist()),
        target_starts=tuple(target_starts.tolist()),
        attention=attention,
    )


def _to_tensor(values: np.ndarray, dtype: type[np.generic]) -> torch.Tensor:
    """The values in one piece of memory, copied only where they must be."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype))
