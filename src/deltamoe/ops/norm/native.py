"""Norms on the CPU in C++: one pass forward, one backward; kept are the inputs, or their sum."""

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import address, num_threads
from deltamoe.ops.norm import reference

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]

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
    library.add_rms_norm_forward.argtypes = [*start, *[ctypes.c_void_p] * 5]
    library.add_rms_norm_forward.restype = None
    library.add_rms_norm_backward.argtypes = [*start, *[ctypes.c_void_p] * 7]
    library.add_rms_norm_backward.restype = None
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


def add_rms_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch``, and its norm."""
    wide = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    dtype = dtype or wide
    has_other_shape = branch is not None and branch.shape != x.shape
    if has_other_shape or {wide, dtype} - set(_DTYPES):
        return reference.add_rms_norm(x, branch, weight, eps, dtype=dtype)
    if branch is not None and branch.dtype not in _DTYPES:
        branch = branch.to(wide)
    total, y = _AddRmsNorm.apply(x.to(wide), branch, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return total, y


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


class _AddRmsNorm(torch.autograd.Function):
    """Keeps the sum alone. Its own gradient is added in the norm's backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        scale = weight.to(torch.float32).contiguous()
        total = x if branch is None else torch.empty_like(x)
        y = torch.empty(x.shape, dtype=dtype)
        branch_dtype = x.dtype if branch is None else branch.dtype
        _library().add_rms_norm_forward(
            *_start_of_sum(x, eps, branch_dtype, dtype),
            *(address(t) for t in (x, branch, scale, total, y)),
        )
        ctx.save_for_backward(total, scale)
        ctx.options = eps, branch_dtype, dtype, weight.dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale = ctx.saved_tensors
        eps, branch_dtype, dtype, weight_dtype = ctx.options
        d_total = None if d_total is None else d_total.contiguous()
        d_y = torch.zeros(total.shape, dtype=dtype) if d_y is None else d_y.contiguous()
        d_x = torch.empty_like(total)
        is_narrower = branch_dtype != total.dtype
        d_branch = torch.empty(total.shape, dtype=branch_dtype) if is_narrower else None
        d_scale = torch.empty_like(scale)
        _library().add_rms_norm_backward(
            *_start_of_sum(total, eps, branch_dtype, dtype),
            *(address(t) for t in (total, scale, d_total, d_y, d_x, d_branch, d_scale)),
        )
        d_branch = d_branch if is_narrower else d_x
        return (
            d_x,
            d_branch if ctx.needs_input_grad[1] else None,
            d_scale.to(weight_dtype),
            None,
            None,
        )


def _start(
    rows: Tensor, eps: float, activation: str, y_dtype: torch.dtype
) -> tuple[_Shape, int, bool, bool]:
    threads = num_threads(rows.numel())
    shape = _Shape(*rows.shape, rows.stride(0), eps, threads)
    bf16 = torch.bfloat16
    return shape, _ACTIVATIONS[activation], rows.dtype == bf16, y_dtype == bf16


def _start_of_sum(
    x: Tensor, eps: float, branch_dtype: torch.dtype, y_dtype: torch.dtype
) -> tuple[_Shape, int, bool, bool]:
    rows, size = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _Shape(rows, size, size, eps, num_threads(x.numel()))
    bf16 = torch.bfloat16
    return shape, x.dtype == bf16, branch_dtype == bf16, y_dtype == bf16
