"""Causal attention on the CPU in C++: any mix of sequence lengths in one call, O(T) memory.

Inputs are read where they stand, in fp32 or bf16; sums are fp32.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import num_threads

__all__ = ["causal_attention"]


class _Part(ctypes.Structure):
    """What ``attention.cpp`` calls Part: a tensor [tokens, heads, channels]."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row", "head", "size")),
    )


class _Inputs(ctypes.Structure):
    """What ``attention.cpp`` calls Inputs."""

    _fields_ = (
        *((name, _Part) for name in ("q", "q_shared", "k", "k_shared", "v")),
        *((name, ctypes.c_int64) for name in ("heads", "num_borders")),
        ("borders", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("attention")
    inputs, part = ctypes.POINTER(_Inputs), ctypes.POINTER(_Part)
    library.attention_forward.argtypes = [inputs, ctypes.c_int, part, ctypes.c_void_p]
    library.attention_forward.restype = None
    library.attention_backward.argtypes = [
        *(inputs, ctypes.c_int, part, ctypes.c_void_p, part),
        part,
    ]
    library.attention_backward.restype = None
    return library


def causal_attention(
    q: Tensor,
    q_shared: Tensor,
    k: Tensor,
    k_shared: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend from each token to itself and those before it in its sequence."""
    batch, time = v.shape[:2]
    if cu_seqlens is None:
        borders = torch.arange(batch + 1) * time
    else:
        borders = cu_seqlens.to(torch.int64).contiguous()
    tokens = (_rows(x.to(v.dtype)) for x in (q, q_shared, k, k_shared, v))
    out: Tensor = _CausalAttention.apply(*tokens, borders)  # type: ignore[no-untyped-call]
    return out.view(v.shape)


def _rows(x: Tensor) -> Tensor:
    """[B T, ...] with touching channels; a view where the strides allow it."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _CausalAttention(torch.autograd.Function):
    """Keeps the inputs, the outputs and the log of each query's sum of exponentials."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_shared: Tensor,
        k: Tensor,
        k_shared: Tensor,
        v: Tensor,
        borders: Tensor,
    ) -> Tensor:
        out = torch.empty(v.shape, dtype=v.dtype)
        log_sums = torch.empty(v.shape[:2], dtype=torch.float32)
        is_bf16 = v.dtype == torch.bfloat16
        inputs = _inputs(q, q_shared, k, k_shared, v, borders)
        _library().attention_forward(inputs, is_bf16, _part(out), log_sums.data_ptr())
        ctx.save_for_backward(q, q_shared, k, k_shared, v, borders, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, q_shared, k, k_shared, v, borders, out, log_sums = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_q, d_q_shared, d_k, d_v = (
            torch.empty(x.shape, dtype=x.dtype) for x in (q, q_shared, k, v)
        )
        d_by_heads = torch.empty_like(d_q_shared)
        gradients = [_part(x) for x in (d_q, d_q_shared, d_k, d_by_heads, d_v)]
        _library().attention_backward(
            _inputs(q, q_shared, k, k_shared, v, borders),
            v.dtype == torch.bfloat16,
            *(_part(out), log_sums.data_ptr(), _part(d_out)),
            (_Part * len(gradients))(*gradients),
        )
        return d_q, d_q_shared, d_k, d_by_heads.sum(dim=1), d_v, None


def _inputs(
    q: Tensor, q_shared: Tensor, k: Tensor, k_shared: Tensor, v: Tensor, borders: Tensor
) -> _Inputs:
    tokens, heads, size = q.shape
    shared = _Part(k_shared.data_ptr(), k_shared.stride(0), 0, k_shared.shape[1])
    return _Inputs(
        *(_part(q), _part(q_shared), _part(k), shared, _part(v)),
        *(heads, len(borders), borders.data_ptr()),
        (size + shared.size) ** -0.5,
        num_threads(tokens * heads * size),
    )


def _part(x: Tensor) -> _Part:
    return _Part(x.data_ptr(), x.stride(0), x.stride(1), x.shape[2])
