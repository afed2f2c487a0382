"""The decay on the CPU in C++: one pass forward, one pass backward."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import num_threads

__all__ = ["kda_decay"]


@cache
def _library() -> ctypes.CDLL:
    library = open_library("decay")
    start: list[Any] = [
        *[ctypes.c_int] * 2,
        *[ctypes.c_int64] * 2,
        *(ctypes.c_float, ctypes.c_int),
    ]
    library.decay_forward.argtypes = [*start, *[ctypes.c_void_p] * 4]
    library.decay_forward.restype = None
    library.decay_backward.argtypes = [*start, *[ctypes.c_void_p] * 7]
    library.decay_backward.restype = None
    return library


def kda_decay(
    logits: Tensor, A_log: Tensor, dt_bias: Tensor, *, lower_bound: float | None = None
) -> Tensor:
    """Turn decay logits into log_decay <= 0."""
    result: Tensor = _KdaDecay.apply(logits, A_log, dt_bias, lower_bound)  # type: ignore[no-untyped-call]
    return result


class _KdaDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None
    ) -> Tensor:
        logits = logits.contiguous()
        rate = A_log.float().exp().repeat_interleave(logits.shape[-1])
        bias = dt_bias.float().contiguous()
        y = torch.empty(logits.shape, dtype=torch.float32)
        ctx.save_for_backward(logits, rate, bias)
        ctx.options = lower_bound, A_log.dtype, dt_bias.dtype
        _library().decay_forward(
            *_start(logits, rate, lower_bound), *(t.data_ptr() for t in (logits, rate, bias, y))
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        logits, rate, bias = ctx.saved_tensors
        lower_bound, rate_dtype, bias_dtype = ctx.options
        d_y = d_y.contiguous()
        d_logits, d_bias, d_rate = (torch.empty_like(t) for t in (logits, bias, rate))
        _library().decay_backward(
            *_start(logits, rate, lower_bound),
            *(t.data_ptr() for t in (logits, rate, bias, d_y, d_logits, d_bias, d_rate)),
        )
        d_A_log = d_rate.view(logits.shape[-2:]).sum(dim=-1)
        return d_logits, d_A_log.to(rate_dtype), d_bias.to(bias_dtype), None


def _start(
    logits: Tensor, rate: Tensor, lower_bound: float | None
) -> tuple[bool, bool, int, int, float, int]:
    columns = len(rate)
    return (
        logits.dtype == torch.bfloat16,
        lower_bound is not None,
        *(logits.numel() // max(columns, 1), columns),
        lower_bound or 0.0,
        num_threads(logits.numel()),
    )
