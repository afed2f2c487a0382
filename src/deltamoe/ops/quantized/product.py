"""``x @ weight.T`` for a quantised weight, and the weight unpacked for many products."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deltamoe.ops import native
from deltamoe.ops.quantized.format import TILE, QuantizedWeight, dequantize
from deltamoe.ops.quantized.native import multiply
from deltamoe.ops.quantized.native import unpack as unpack_native

__all__ = ["has_few_rows", "linear", "unpack"]

_FEW = 16
"""Rows up to which reading the weight takes longer than computing."""
_BLOCK = 1 << 20
"""Weights that are unpacked at a time: 4 MiB in fp32."""


def linear(x: Float[Tensor, "*batch in"], weight: QuantizedWeight) -> Float[Tensor, "*batch out"]:
    """Multiply by a quantised matrix without leading axes; the result has x's dtype.

    On a CPU up to 16 rows are rounded to 8 bits (``quantize_activations``) and multiplied in C++,
    which reads the weight once. For more rows, elsewhere, in fp64 or without a compiler the weight
    is unpacked block by block into x's dtype.
    """
    if weight.values.ndim != 3:
        raise ValueError(f"expected one matrix, got a weight of shape {tuple(weight.shape)}")
    if has_few_rows(x):
        y = multiply(x.reshape(-1, x.shape[-1]).float(), weight)
        return y.view(*x.shape[:-1], -1).to(x.dtype)
    tiles = max(1, _BLOCK // (TILE * weight.in_features))
    parts = []
    for first in range(0, weight.values.shape[0], tiles):
        here = slice(first, first + tiles)
        block = weight._replace(
            values=weight.values[here],
            scales=weight.scales[here],
            out_features=min(weight.out_features - first * TILE, tiles * TILE),
        )
        parts.append(F.linear(x, unpack(block, x.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(weight: QuantizedWeight, dtype: torch.dtype) -> Float[Tensor, "*lead out in"]:
    """The matrix that the codes stand for, in the quickest way there is; see ``dequantize``."""
    if _is_narrow(weight.values, dtype) and native.why_not("matvec") is None:
        return unpack_native(weight, dtype)
    return dequantize(weight, dtype)


def has_few_rows(x: Float[Tensor, "*batch in"]) -> bool:
    """Whether ``linear`` rounds x to 8 bits and reads the codes as they are."""
    is_few = x.numel() <= _FEW * x.shape[-1]
    return is_few and _is_narrow(x, x.dtype) and native.why_not("matvec") is None


def _is_narrow(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
