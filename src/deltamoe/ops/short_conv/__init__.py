"""The short causal convolution in front of KDA: each channel sees its last W inputs.

    y[t] = silu( sum_j weight[j] x[t - (W - 1) + j] )        weight[W - 1] is the current token's

Before a sequence's first token stand zeros, or the inputs carried over from an earlier call.

Lives here: the operator and, in ``reference.py``, its definition; the CPU's kernel is
``native.py`` over ``ops/native/conv.cpp``.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
Source: Kimi Linear (arXiv 2510.26692), section 4; the published modeling code.
"""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.short_conv import reference

__all__ = ["normalized_short_conv", "short_conv"]


def short_conv(
    x: Float[Tensor, "B T channels"],
    weight: Float[Tensor, "channels W"],
    past: Float[Tensor, "N W-1 channels"] | None = None,
    *,
    lengths: Int[Tensor, "B"] | None = None,
    cu_seqlens: Int[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "B T channels"], Float[Tensor, "N W-1 channels"]]:
    """Convolve along T and apply SiLU.

    Args:
        x: inputs.
        weight: taps, oldest first.
        past: the last W - 1 inputs before x, oldest first; None means zeros. N is B, or the
            number of sequences when ``cu_seqlens`` is given.
        lengths: valid tokens of each row; the rest is padding and does not enter the state.
        cu_seqlens: borders of sequences packed along T (B must be 1).

    Returns:
        Outputs in x's dtype, and the last W - 1 inputs of every sequence.
    """
    result: tuple[Tensor, Tensor] = _backend(x).short_conv(
        x, weight, past, lengths=lengths, cu_seqlens=cu_seqlens
    )
    return result


def normalized_short_conv(
    x: Float[Tensor, "B T channels"],
    weight: Float[Tensor, "channels W"],
    past: Float[Tensor, "N W-1 channels"] | None = None,
    *,
    head_dim: int,
    scale: float,
    lengths: Int[Tensor, "B"] | None = None,
    cu_seqlens: Int[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "N W-1 channels"]]:
    """Convolve, apply SiLU, then bring each head's vector to length ``scale``: KDA's q and k.

    Args:
        x, weight, past, lengths, cu_seqlens: as in ``short_conv``.
        head_dim: K; heads are K neighbouring channels.
        scale: of the result; see ``l2_normalize`` for what stands under the root.

    Returns:
        Heads in fp32 (fp64 for fp64 inputs), and the last W - 1 inputs of every sequence.
    """
    result: tuple[Tensor, Tensor] = _backend(x).normalized_short_conv(
        x, weight, past, head_dim=head_dim, scale=scale, lengths=lengths, cu_seqlens=cu_seqlens
    )
    return result


def _backend(x: Tensor) -> ModuleType:
    if torch.compiler.is_compiling():  # it traces PyTorch's operations, and fuses them itself
        return reference
    return select("short_conv", "auto", x.device.type, x.dtype)
