"""Norms on the CPU in C++: one pass forward, one pass backward, nothing kept but the inputs."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import address, num_threads
from deltamoe.ops.norm import reference

__all__ = ["gated_rms_norm", "rms_norm"]

_ACTIVATIONS = {"none": 0, "sigmoid": 1, "swish": 2}
_DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    """What ``norm.cpp`` calls Shape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "size", "x_row")),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("norm")
    start: list[Any] = [ctypes.POINTER(_Shape), *[ctypes.c_int] * 3]
    library.rms_norm_forward.argtypes = [*start, *[ctypes.c_void_p] * 4]
    library.rms_norm_forward.restype = None
    library.rms_norm_backward.argtypes = [*start, *[ctypes.c_void_p] * 7]
    library.rms_norm_backward.restype = None
    return library


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Scale each vector to root-mean-square 1, then by ``weight``."""
    dtype = dtype or x.dtype
    if dtype not in _DTYPES:
        return reference.rms_norm(x, weight, eps, dtype=dtype)
    result: Tensor = _RmsNorm.apply(x, None, weight, eps, "none", dtype)  # type: ignore[no-untyped-call]
    return result


def gated_rms_norm(
    x: Tensor,
    logits: Tensor,
    weight: Tensor,
    eps: float,
    *,
    activation: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``rms_norm(x) * activation(logits)``."""
    dtype = dtype or x.dtype
    if dtype not in _DTYPES:
        return reference.gated_rms_norm(x, logits, weight, eps, activation=activation, dtype=dtype)
    wider = torch.promote_types(x.dtype, logits.dtype)
    result: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
        x.to(wider), logits.to(wider), weight, eps, activation, dtype
    )
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        logits: Tensor | None,
        weight: Tensor,
        eps: float,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # a view, unless x's rows stand at uneven distances
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        logits = None if logits is None else logits.contiguous()
        scale = weight.to(torch.float32).contiguous()
        y = torch.empty(x.shape, dtype=dtype)
        ctx.save_for_backward(rows, logits, scale)
        ctx.options = eps, activation, weight.dtype
        _library().rms_norm_forward(
            *_start(rows, eps, activation, dtype), *(address(t) for t in (rows, scale, logits, y))
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, logits, scale = ctx.saved_tensors
        eps, activation, weight_dtype = ctx.options
        d_y = d_y.contiguous()
        d_x = torch.empty(d_y.shape, dtype=rows.dtype)
        d_logits = None if logits is None else torch.empty_like(logits)
        d_scale = torch.empty_like(scale)
        _library().rms_norm_backward(
            *_start(rows, eps, activation, d_y.dtype),
            *(address(t) for t in (rows, scale, logits, d_y, d_x, d_scale, d_logits)),
        )
        return d_x, d_logits, d_scale.to(weight_dtype), None, None, None


def _start(
    rows: Tensor, eps: float, activation: str, y_dtype: torch.dtype
) -> tuple[_Shape, int, bool, bool]:
    threads = num_threads(rows.numel())
    shape = _Shape(*rows.shape, rows.stride(0), eps, threads)
    bf16 = torch.bfloat16
    return shape, _ACTIVATIONS[activation], rows.dtype == bf16, y_dtype == bf16
