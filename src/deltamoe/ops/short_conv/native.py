"""The short convolution on the CPU, called through ``conv.cpp``."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import address, num_threads

__all__ = ["normalized_short_conv", "short_conv"]

_EPS = 1e-6  # as ``l2_normalize``


class _Shape(ctypes.Structure):
    """What ``conv.cpp`` calls Shape: sizes, x's strides, the sequences' borders, the heads."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "channels", "width")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_row", "num_borders")),
        ("borders", ctypes.c_void_p),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("conv")
    pointer = ctypes.c_void_p
    start: list[Any] = [ctypes.POINTER(_Shape), ctypes.c_int, pointer, pointer, pointer]
    library.short_conv_forward.argtypes = [*start, pointer]
    library.short_conv_forward.restype = None
    library.short_conv_backward.argtypes = [*start, pointer, pointer, pointer, pointer]
    library.short_conv_backward.restype = None
    return library


def short_conv(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve along T and apply SiLU."""
    past = None if past is None else past.to(x.dtype)
    y: Tensor = _ShortConv.apply(x, weight, past, cu_seqlens, 0, 1.0)  # type: ignore[no-untyped-call]
    return y, _last_inputs(x, past, weight.shape[1] - 1, lengths, cu_seqlens)


def normalized_short_conv(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    *,
    head_dim: int,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve, then bring each head's vector to length ``scale``."""
    past = None if past is None else past.to(x.dtype)
    y: Tensor = _ShortConv.apply(x, weight, past, cu_seqlens, head_dim, scale)  # type: ignore[no-untyped-call]
    last = _last_inputs(x, past, weight.shape[1] - 1, lengths, cu_seqlens)
    return y.unflatten(-1, (-1, head_dim)), last


class _ShortConv(torch.autograd.Function):
    """Keeps the inputs alone; the backward pass computes the sums again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        past: Tensor | None,
        cu_seqlens: Tensor | None,
        head_dim: int,
        scale: float,
    ) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        past = None if past is None else past.contiguous()
        taps = weight.to(torch.float32).contiguous()
        borders = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        y = torch.empty(x.shape, dtype=torch.float32 if head_dim else x.dtype)
        shape = _shape(x, taps, borders, head_dim, scale)
        _library().short_conv_forward(
            shape, x.dtype == torch.bfloat16, address(x), address(taps), address(past), address(y)
        )
        ctx.save_for_backward(x, taps, past, borders)
        ctx.heads = head_dim, scale
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, past, borders = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_x = torch.empty(x.shape, dtype=x.dtype)
        d_taps = torch.empty_like(taps)
        d_past = torch.zeros_like(past) if ctx.needs_input_grad[2] else None
        shape = _shape(x, taps, borders, *ctx.heads)
        _library().short_conv_backward(
            shape,
            x.dtype == torch.bfloat16,
            *(address(tensor) for tensor in (x, taps, past, d_y, d_x, d_taps, d_past)),
        )
        return d_x, d_taps.to(ctx.weight_dtype), d_past, None, None, None


def _shape(x: Tensor, taps: Tensor, borders: Tensor | None, head_dim: int, scale: float) -> _Shape:
    return _Shape(
        *x.shape,
        taps.shape[1],
        *(x.stride(0), x.stride(1)),
        *(0 if borders is None else len(borders), address(borders)),
        *(head_dim, scale, _EPS),
        num_threads(x.numel()),
    )


def _last_inputs(
    x: Tensor, past: Tensor | None, extra: int, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The last ``extra`` inputs of every sequence: [N, W - 1, channels]."""
    batch, time, channels = x.shape
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if past is None:
        past = x.new_zeros(sequences, extra, channels)
    if lengths is None and cu_seqlens is None:
        return x[:, time - extra :] if time >= extra else torch.cat([past, x], dim=1)[:, time:]
    if time == 0 or extra == 0:
        return past
    row = torch.arange(sequences)[:, None]
    if cu_seqlens is None:
        start, batch_row, length = torch.zeros_like(row), row, lengths
    else:
        start, batch_row, length = cu_seqlens[:-1, None], torch.zeros_like(row), cu_seqlens.diff()
    assert length is not None
    place = length[:, None] + torch.arange(-extra, 0)  # in its sequence; the past is negative
    here = x[batch_row, (start + place).clamp(0, time - 1)]
    before = past[row, (place + extra).clamp(max=extra - 1)]
    return torch.where(place[..., None] < 0, before, here)
