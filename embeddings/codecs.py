"""How rows and their gradients are encoded between ranks: TorchRec's quantised communication.

    table.communication   a row                              its gradient
    fp32                  4 r bytes                          4 r bytes
    fp16                  2 r                                2 r, bf16
    bf16                  2 r                                2 r, bf16
    int8                  r + 8: with scale and minimum      2 r, bf16

Rows that are kept, their optimizer's state and all sums stay fp32.

FBGEMM's fp8 is left out: with a scale it has no kernel for CPUs and is as long as int8; without one it
does not fit TorchRec on CPUs, and cuts off what is above 0.9375 (docs/experiments/exchange.md).

Shapes: r width.
"""

from typing import Any

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

_SCALE_AND_MINIMUM = 8

_ROWS = {
    "fp32": SparseType.FP32,
    "fp16": SparseType.FP16,
    "bf16": SparseType.BF16,
    "int8": SparseType.INT8,
}


class RowCodec(QuantizedCommCodec):
    """FBGEMM's codec with a scale for each row; FBGEMM's own has one for each 32 numbers."""

    def __init__(self, precision: SparseType, dim: int):
        super().__init__(precision)
        self._dim = dim

    def create_context(self) -> QuantizationContext:
        """How long a row is."""
        return QuantizationContext(self._dim)


def communication_codecs(precision: str, dim: int) -> dict[str, Any] | None:
    """How TorchRec encodes rows and their gradients between ranks; None where it does not.

    precision: table.communication.
    """
    if precision == "fp32":
        return None
    # Not by TorchRec's get_qcomm_codecs_registry: on gloo that makes fp16 of bf16, which gloo carries
    # as well.
    codecs = QuantizedCommCodecs(
        forward=RowCodec(_ROWS[precision], dim),
        backward=RowCodec(_gradient_format(precision), dim),
    )
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: codecs}


def encode_gradient(precision: str, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as it travels between copies of the table, in the format of those within one."""
    if precision == "fp32":
        return gradient
    return gradient.to(torch.bfloat16)


def row_bytes(precision: str, dim: int) -> int:
    """Bytes of a row between ranks."""
    return _encoded_bytes(_ROWS[precision], dim)


def gradient_bytes(precision: str, dim: int) -> int:
    """Bytes of a row's gradient between ranks."""
    return _encoded_bytes(_gradient_format(precision), dim)


def _gradient_format(precision: str) -> SparseType:
    """bf16, where rows are not fp32.

    A gradient of a mean over 10⁵ targets is often below 1e-8. fp16 has nothing below 6e-8, and
    FBGEMM's int8 adds 1e-8 to a row's range.
    """
    return SparseType.FP32 if precision == "fp32" else SparseType.BF16


def _encoded_bytes(kind: SparseType, dim: int) -> int:
    if kind == SparseType.INT8:
        return dim + _SCALE_AND_MINIMUM
    return dim * kind.as_dtype().itemsize
