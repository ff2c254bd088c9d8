"""How packed sequences lie before attention: bucketing by length, so that padding is rare.

Sizes: M packed tokens, S sequences, P padded slots of all buckets.
"""

from dataclasses import dataclass

import numpy as np
import torch

# That attention's CUDA kernels take in one call. The number is a dimension of the grid, and all
# dimensions but the first end at 65,535 (FlashAttention 2: `dim3 grid(num_m_block, params.b,
# params.h)`; the memory-efficient kernel: `dim3(…, num_heads, num_batches)`).
MOST_SEQUENCES = 65_535

_LEAST_SPREAD = 8  # tokens by which lengths in one bucket may differ, however short they are


@dataclass(frozen=True)
class AttentionLayout:
    """Where sequences begin, and how packed tokens lie in buckets of right-padded sequences.

    Attributes:
        starts_S: the first token of each sequence, and behind them M; S + 1 numbers.
        shapes: (sequences, padded length) of each bucket, longest first.
        pad_P: the token in each padded slot. A slot behind a sequence's end repeats its last
            token: under a causal mask no real token sees it.
        unpad_M: the slot of each token.
        pieces: (sequences, tokens) of the parts in which a kernel takes sequences, in order,
            where it cannot take all of them in one call.

    Example: four users, whose sequences have 3, 1, 0 and 2 tokens:

        tokens      0 1 2 | 3 | | 4 5
        starts_S    tensor([0, 3, 4, 4, 6])
        shapes      ((3, 3),)             one bucket of three sequences, padded to 3 tokens
        pad_P       tensor([0, 1, 2,      the longest first
                            4, 5, 5,      slot 5 repeats token 5
                            3, 3, 3])     the empty sequence has no row
        unpad_M     tensor([0, 1, 2, 6, 3, 4])
        pieces      ((4, 6),)
    """

    starts_S: torch.Tensor
    shapes: tuple[tuple[int, int], ...]
    pad_P: torch.Tensor
    unpad_M: torch.Tensor
    pieces: tuple[tuple[int, int], ...]


def build_attention_layout(lengths_S: np.ndarray) -> AttentionLayout:
    """Buckets sequences of similar length, longest first, so that a padded slot is rare.

    lengths_S: int64 (S,), tokens of each sequence; some may have none.
    """
    starts_S = np.cumsum(lengths_S) - lengths_S
    order = sort_small(-lengths_S, int(lengths_S.max(initial=0)))
    # An empty sequence has nothing to show.
    order = order[: np.count_nonzero(lengths_S)]
    shapes = _choose_buckets(lengths_S[order])
    pad_P, row_S = _fill_buckets(shapes, order, lengths_S, starts_S)
    unpad_M = np.repeat((row_S - starts_S).astype(np.int32), lengths_S)
    unpad_M += np.arange(len(unpad_M), dtype=np.int32)
    bounds_S = np.concatenate([[0], np.cumsum(lengths_S)], dtype=np.int32)
    return AttentionLayout(
        starts_S=torch.from_numpy(bounds_S),
        shapes=tuple(shapes),
        pad_P=torch.from_numpy(pad_P),
        unpad_M=torch.from_numpy(unpad_M),
        pieces=cut_pieces(bounds_S),
    )


def _choose_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(sequences, padded length) of each bucket. lengths: of the sequences, falling."""
    falling = -lengths
    shapes = []
    begin = 0
    while begin < len(lengths):
        longest = int(lengths[begin])
        shortest = longest - max(_LEAST_SPREAD, longest // 4)
        end = int(np.searchsorted(falling, -shortest, side="left"))
        shapes.append((end - begin, longest))
        begin = end
    return shapes


def _fill_buckets(
    shapes: list[tuple[int, int]],
    order: np.ndarray,
    lengths_S: np.ndarray,
    starts_S: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """pad_P, and the first slot of each sequence (S,). order: the sequences, bucket by bucket."""
    slots = 0
    for sequences, longest in shapes:
        slots += sequences * longest
    pad_P = np.empty(slots, np.int32)
    row_S = np.zeros(len(lengths_S), np.int32)
    lengths = lengths_S[order].astype(np.int32)
    starts = starts_S[order].astype(np.int32)
    begin = 0
    slot = 0
    for sequences, longest in shapes:
        bucket = slice(begin, begin + sequences)
        end_slot = slot + sequences * longest
        grid = pad_P[slot:end_slot].reshape(sequences, longest)
        columns = np.arange(longest, dtype=np.int32)
        np.minimum(columns, lengths[bucket, None] - 1, out=grid)
        grid += starts[bucket, None]
        row_S[order[bucket]] = slot + longest * np.arange(sequences)
        begin += sequences
        slot = end_slot
    return pad_P, row_S


def cut_pieces(bounds_S: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(sequences, tokens) of each run of at most MOST_SEQUENCES sequences."""
    sequences = len(bounds_S) - 1
    firsts = np.arange(0, sequences, MOST_SEQUENCES)
    ends = np.minimum(firsts + MOST_SEQUENCES, sequences)
    counts = ends - firsts
    tokens = bounds_S[ends] - bounds_S[firsts]
    return tuple(zip(counts.tolist(), tokens.tolist(), strict=True))


def sort_small(values: np.ndarray, bound: int) -> np.ndarray:
    """A stable order of integers less than `bound` away from 0.

    NumPy sorts integers of 8 and 16 bits by counting, which is several times as fast.
    """
    for dtype in (np.int8, np.int16):
        if bound <= np.iinfo(dtype).max:
            values = values.astype(dtype, copy=False)
            break
    return np.argsort(values, kind="stable")
