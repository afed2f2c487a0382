"""KDA in C++ for the CPU: every chunk's work stays in one core's cache.

The same arithmetic as ``dyadic`` (survival by halves, exact for any decay) in fp32, or with
products rounded to bf16 where values come so and the processor has AMX. For the backward pass it
keeps the inputs, the memory at each chunk's start, and per chunk the deltas and two C x C
matrices: in bf16 what only rounded products read.

Boundary: lays tensors out for ``ops/native/kda.cpp``, which holds the algorithm.
"""

import ctypes
from ctypes import POINTER, byref, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.kda import reference
from deltamoe.ops.kda.shapes import initial_memory
from deltamoe.ops.native import open_library

__all__ = ["kda_chunk", "kda_recurrent"]

_BLOCK, _TILE = 16, 32
_LARGEST_CHUNK = 128


def kda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run KDA token by token; see ``deltamoe.ops.kda``. With gradients, by the definition."""
    inputs = (q, k, v, log_decay, beta)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, memory) if x is not None):
        return reference.kda_recurrent(*inputs, memory, cu_seqlens=cu_seqlens)
    memory = initial_memory(q, v, memory, cu_seqlens).contiguous()
    if v.numel() == 0 or memory.numel() == 0:
        return v, memory
    laid_out = _lay_out(*inputs)
    out, final = v.new_empty(v.shape), torch.empty_like(memory)
    sequences = _Sequences(v.shape[0], v.shape[1], cu_seqlens, 1)
    problem = _problem(laid_out, out, sequences, memory, 1)
    problem.final_memory = final.data_ptr()
    _library().kda_recurrent(byref(problem), sequences.longest_first.data_ptr())
    return out, final


def kda_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run KDA over many tokens at once; see ``deltamoe.ops.kda``.

    The chunk is ``chunk_size`` rounded down to 16, 32, 64 or 128 tokens (16 at least).
    """
    memory = initial_memory(q, v, memory, cu_seqlens)
    if v.numel() == 0 or memory.numel() == 0:
        return v, memory
    inputs = (*_lay_out(q, k, v, log_decay, beta), memory.contiguous())
    result: tuple[Tensor, Tensor] = _KdaChunk.apply(  # type: ignore[no-untyped-call]
        *inputs,
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        cu_seqlens,
        min(max(1 << (chunk_size.bit_length() - 1), _BLOCK), _LARGEST_CHUNK),
    )
    return result


def _lay_out(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs as [B, T, heads, channels], readable in place."""
    q, k, v, log_decay, beta = map(_contiguous_channels, (q, k, v, log_decay, beta.unsqueeze(-1)))
    return q, k, v, log_decay, beta


def _contiguous_channels(x: Tensor) -> Tensor:
    """Fp32 or bf16 with the last axis contiguous; what the C++ side reads in place."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("batch", c_int64),
        ("time", c_int64),
        ("head", c_int64),
        ("is_bf16", c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> "_Tensor":
        return cls(x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16)


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("sequences", "heads", "value_heads")),
        *((name, c_int64) for name in ("key_dim", "value_dim", "chunk", "num_threads")),
        *((name, c_void_p) for name in ("batch_of", "start", "length", "first_chunk")),
        *((name, _Tensor) for name in ("q", "k", "v", "log_decay", "beta", "out")),
        *((name, c_void_p) for name in ("memory", "final_memory")),
        *((name, c_void_p) for name in ("starts", "deltas", "q_on_k", "system")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        ("out", _Tensor),
        ("final_memory", c_void_p),
        *((name, _Tensor) for name in ("q", "k", "v", "log_decay", "beta")),
        ("memory", c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("kda")
    for function in (library.kda_forward, library.kda_recurrent):
        function.argtypes = [POINTER(_Problem), c_void_p]
        function.restype = None
    library.kda_rounds.argtypes, library.kda_rounds.restype = [c_int64, c_int64], c_int64
    library.kda_backward.argtypes = [POINTER(_Problem), POINTER(_Gradients), c_void_p]
    library.kda_backward.restype = None
    return library


class _Sequences:
    """Where each sequence lies, on the CPU as int64: [batch row, start, length, first chunk]."""

    def __init__(self, batch: int, time: int, cu_seqlens: Tensor | None, chunk: int) -> None:
        if cu_seqlens is None:
            batch_of = torch.arange(batch)
            start = torch.zeros(batch, dtype=torch.int64)
            length = torch.full((batch,), time)
        else:
            start, length = cu_seqlens[:-1], cu_seqlens.diff()
            batch_of = torch.zeros_like(start)
        chunks = (length + chunk - 1) // chunk
        self.num_chunks = int(chunks.sum())
        self.table = torch.stack([batch_of, start, length, chunks.cumsum(0) - chunks])
        self.longest_first = torch.argsort(length, descending=True, stable=True)

    def __len__(self) -> int:
        return len(self.longest_first)


def _problem(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    sequences: _Sequences,
    memory: Tensor,
    chunk: int,
) -> _Problem:
    """What both directions need to know; the saved tensors are set by the caller."""
    q, _, v, _, _ = inputs
    return _Problem(
        len(sequences),
        q.shape[2],
        v.shape[2],
        q.shape[3],
        v.shape[3],
        chunk,
        torch.get_num_threads(),
        *(row.data_ptr() for row in sequences.table),
        *(_Tensor.of(x) for x in (*inputs, out)),
        memory.data_ptr(),
    )


class _KdaChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        memory: Tensor,
        keeps: bool,
        cu_seqlens: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        batch, time, value_heads, _ = v.shape
        sequences = _Sequences(batch, time, cu_seqlens, chunk)
        out = v.new_empty(v.shape)
        final = torch.empty_like(memory)
        inputs = (q, k, v, log_decay, beta)
        problem = _problem(inputs, out, sequences, memory, chunk)
        problem.final_memory = final.data_ptr()
        if keeps:
            rounds = _library().kda_rounds(v.dtype == torch.bfloat16, chunk)
            kind, unit = (torch.bfloat16, _TILE) if rounds else (torch.float32, _BLOCK)
            K, V = (-(-n // unit) * unit for n in (q.shape[3], v.shape[3]))
            saved = [
                memory.new_empty(sequences.num_chunks, value_heads, rows, columns, dtype=kind)
                for rows, columns in ((K, V), (chunk, V), (chunk, chunk))
            ]
            saved.append(memory.new_empty(sequences.num_chunks, value_heads, chunk, chunk))
            _set_saved(problem, saved)
            ctx.save_for_backward(*inputs, *saved)
            ctx.sequences, ctx.chunk = sequences, chunk
        _library().kda_forward(byref(problem), sequences.longest_first.data_ptr())
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, *saved = ctx.saved_tensors
        d_out, d_final = _contiguous_channels(d_out), d_final.contiguous()
        d_memory = torch.empty_like(d_final)
        problem = _problem((q, k, v, log_decay, beta), d_out, ctx.sequences, d_final, ctx.chunk)
        _set_saved(problem, saved)
        # Value heads of one query head add to the same gradient: in fp32, whatever q's dtype.
        adds = q.shape[2] < v.shape[2]
        found = tuple(
            torch.empty(x.shape, dtype=torch.float32 if is_shared else x.dtype)
            for x, is_shared in (
                (q, adds),
                (k, adds),
                (v, False),
                (log_decay, False),
                (beta, False),
            )
        )
        gradients = _Gradients(
            _Tensor.of(d_out),
            d_final.data_ptr(),
            *(_Tensor.of(x) for x in found),
            d_memory.data_ptr(),
        )
        order = ctx.sequences.longest_first.data_ptr()
        _library().kda_backward(byref(problem), byref(gradients), order)
        inputs = (q, k, v, log_decay, beta)
        return (
            *(d.to(x.dtype) for d, x in zip(found, inputs, strict=True)),
            d_memory,
            None,
            None,
            None,
        )


def _set_saved(problem: _Problem, saved: list[Tensor]) -> None:
    problem.starts, problem.deltas, problem.q_on_k, problem.system = (x.data_ptr() for x in saved)
