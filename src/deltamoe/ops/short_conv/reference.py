"""The short convolution in PyTorch's operations: the definition, on any device and in any dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.norm import l2_normalize
from deltamoe.ops.rows import inverse_of, move_rows

__all__ = ["normalized_short_conv", "short_conv"]


def short_conv(
    x: Float[Tensor, "B T channels"],
    weight: Float[Tensor, "channels W"],
    past: Float[Tensor, "N W-1 channels"] | None = None,
    *,
    lengths: Int[Tensor, "B"] | None = None,
    cu_seqlens: Int[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "B T channels"], Float[Tensor, "N W-1 channels"]]:
    """Convolve along T and apply SiLU."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if past is None:
        past = x.new_zeros(sequences, width - 1, channels)
    past = past.to(x.dtype)
    if cu_seqlens is None:
        padded = torch.cat([past, x], dim=1)  # [B, W - 1 + T, channels]
        y = _taps(padded, weight)
        if lengths is None:
            return y, padded[:, time:]
        last = lengths[:, None] + torch.arange(width - 1, device=x.device)
        return y, padded.gather(1, last[..., None].expand(-1, -1, channels))

    # Each packed sequence gets its own past in front; what the taps make of the past is cut out.
    extra = width - 1
    number = torch.arange(sequences, device=x.device)
    sequence_of = number.repeat_interleave(cu_seqlens.diff(), output_size=time)
    here = torch.arange(time, device=x.device) + (sequence_of + 1) * extra
    first = cu_seqlens[:-1] + number * extra  # where each sequence's past begins
    before = (first[:, None] + torch.arange(extra, device=x.device)).flatten()
    target = torch.cat([here, before])
    source = inverse_of(target, time + sequences * extra)
    padded = move_rows(torch.cat([x[0], past.flatten(0, 1)]), source, target)
    y = _taps(padded.unsqueeze(0), weight)[0]
    here = here - extra  # the taps' results start with the first token that has a whole past
    y = move_rows(y, here, inverse_of(here, len(y)))
    last = cu_seqlens[1:, None] + number[:, None] * extra + torch.arange(extra, device=x.device)
    return y.unsqueeze(0), padded[last]


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
    """Convolve, then bring each head's vector to length ``scale``."""
    y, last = short_conv(x, weight, past, lengths=lengths, cu_seqlens=cu_seqlens)
    return l2_normalize(y.unflatten(-1, (-1, head_dim))) * scale, last


def _taps(padded: Tensor, weight: Tensor) -> Tensor:
    """[B, W - 1 + T, channels] -> [B, T, channels]."""
    result: Tensor = _TapsAndSilu.apply(padded, weight)  # type: ignore[no-untyped-call]
    return result


class _TapsAndSilu(torch.autograd.Function):
    """The sum over the taps and the SiLU behind it.

    Written by hand because autograd would build a zero-filled tensor for every tap's slice, and
    would keep the sum as well as the inputs.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        return F.silu(_sum_of_taps(padded, weight)).to(padded.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        total = _sum_of_taps(padded, weight)
        opening = total.sigmoid()
        d_total = d_y * opening * (1 + total * (1 - opening))
        d_padded = torch.zeros_like(padded, dtype=total.dtype)
        d_weight = torch.empty_like(weight)
        time = total.shape[1]
        for j in range(weight.shape[1]):
            seen = slice(j, j + time)
            d_padded[:, seen].addcmul_(d_total, weight[:, j].to(total.dtype))
            d_weight[:, j] = (d_total * padded[:, seen]).sum(dim=(0, 1))
        return d_padded.to(padded.dtype), d_weight


def _sum_of_taps(padded: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[1]
    time = padded.shape[1] - (width - 1)
    total = padded[:, :time] * weight[:, 0]
    for j in range(1, width):
        total.addcmul_(padded[:, j : j + time].to(total.dtype), weight[:, j].to(total.dtype))
    return total
