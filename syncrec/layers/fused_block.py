"""An attention block of K experts as one CPU kernel (syncrec_kernels/block.cpp), and its autograd.

PyTorch's operations pass every intermediate tensor through memory, and on a CPU that takes longer
than the matrix products between them (benchmarks/parts.py). The kernel is held to `Block`'s own
operations by tests/unit/syncrec/layers/test_fused_block.py.

Shapes: K experts, M packed tokens, S sequences, r width.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from syncrec_kernels.build import Unavailable, why_unavailable

_TILE = 384  # rows, few enough to stay in a core's L2 cache

# heads, share, seed, half, save and tile of `block`.
_Settings: TypeAlias = tuple[int, float, int, bool, bool, int]


def chosen(kernel: str, x: Tensor, post_norm: bool) -> bool:
    """Whether the fused kernel is to run: `kernel` as in ModelConfig, x: its input.

    `auto` takes it where it can be had. Raises Unavailable for `fused` where it cannot.
    """
    if kernel == "plain":
        return False
    fits = x.device.type == "cpu" and post_norm
    if not fits or x.dtype not in (torch.float32, torch.float64):
        if kernel == "fused":
            raise Unavailable(
                "model.kernel=fused is for CPU, norm=post and fp32 or bf16; here is "
                f"{x.device.type}: use auto"
            )
        return False
    reason = why_missing()
    if reason and kernel == "fused":
        raise Unavailable(f"model.kernel=fused: {reason}")
    return not reason


def block(
    x_KMR: Tensor,
    starts_S: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    share: float,
    training: bool,
    tile: int | None = None,
) -> Tensor:
    """LayerNorm(y + drop(FFN(y))) with y = LayerNorm(x + drop(Attention(x))): (K, M, r).

    starts_S: where each sequence begins, and M, integers (S + 1). weights, (K, …, …) each: qkv,
    out, w1, w2, b1, b2, and scale and shift of both norms. share: of dropout.

    Under autocast to bfloat16 the matrix products are in it, everything else in fp32. The masks of
    dropout come from one number of PyTorch's generator: they are the same however many threads
    there are.
    """
    half = torch.is_autocast_enabled("cpu") and x_KMR.dtype == torch.float32
    if not training:
        share = 0.0
    seed = int(torch.randint(2**62, ())) if share else 0
    needs_gradient = any(tensor.requires_grad for tensor in (x_KMR, *weights))
    save = torch.is_grad_enabled() and needs_gradient
    settings = (heads, share, seed, half, save, tile or _TILE)
    return _Block.apply(x_KMR, starts_S.long(), settings, *weights)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_KMR: Tensor,
        starts_S: Tensor,
        settings: _Settings,
        *weights: Tensor,
    ) -> Tensor:
        heads, share, seed, half, save, tile = settings
        y_KMR, *intermediates = torch.ops.syncrec.block_forward(
            x_KMR,
            starts_S,
            weights,
            heads,
            share,
            seed,
            half,
            save,
            tile,
        )
        ctx.settings = (heads, share, seed, half, tile)
        ctx.weights = len(weights)
        ctx.save_for_backward(x_KMR, starts_S, *weights, *intermediates)
        return y_KMR

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_KMR, starts_S, *saved = ctx.saved_tensors
        weights = saved[: ctx.weights]
        intermediates = saved[ctx.weights :]
        x_gradient, *gradients = torch.ops.syncrec.block_backward(
            gradient,
            x_KMR,
            starts_S,
            weights,
            intermediates,
            *ctx.settings,
        )
        return x_gradient, None, None, *gradients


def why_missing() -> str | None:
    """None where the kernel is loaded, else why it cannot be."""
    return why_unavailable("block", "experts run two to three times as long")
