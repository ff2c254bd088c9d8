"""Dropout and the sum that follows it, with random bits that are cheap on a CPU.

PyTorch draws a CPU mask number by number, 5 ms for (3, 2304, 128); here one 64-bit draw serves four elements, 1 ms. On other
devices PyTorch's own dropout is as fast as it gets, and is used.
"""

import torch
import torch.nn.functional as F

_LEVELS = (
    2**16
)  # a share is rounded to 1 / 65536, and the scale follows the rounded one


def drop(x, share, training):
    """x with each element 0 with probability `share`, the others divided by 1 − share; x itself outside training."""
    if not training or not share:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    return x * _mask(x, share)


def add_dropped(x, y, share, training):
    """x + drop(y, …): a residual and its branch."""
    if training and share and y.device.type == "cpu":
        return torch.addcmul(x, y, _mask(y, share))
    return x + drop(y, share, training)


def _mask(like, share):
    """0, or what scales the kept elements, from PyTorch's generator."""
    dropped = round(share * _LEVELS)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(
        -(2**63), None
    )
    levels = words.view(torch.int16)[: like.numel()].view(
        like.shape
    )  # even over −32768 … 32767
    return (
        levels.ge_(dropped - _LEVELS // 2)
        .to(like.dtype)
        .mul_(_LEVELS / (_LEVELS - dropped))
    )
