"""Kimi Delta Attention: the definition.

A head keeps a matrix ``memory`` [K, V] that answers "which value belongs to this key?".
One token does four things to it, in this order:

    forget     M <- Diag(decay) M                    each key channel fades at its own rate
    recall     r  = M^T k                            what the memory now says about k
    correct    M <- M + k (beta (v - r))^T           move that answer toward v
    read       o  = M^T q

``kda_recurrent`` is that sentence, token by token. ``kda_chunk`` is the same function for many
tokens at once; docs/kda.md derives it. Every other backend is tested against this file.

Letters: B batch, T time, H heads, HV value heads, K key size, V value size, C chunk length.
Source: Kimi Linear (arXiv 2510.26692), equation 1; the chunk form is its section 3.1.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from deltamoe.ops.kda.shapes import compute_dtype, initial_memory, repeat_heads

__all__ = ["kda_chunk", "kda_recurrent"]


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
    """Apply the four steps to one token after another; see ``deltamoe.ops.kda``."""
    return _each_sequence(_recurrent, q, k, v, log_decay, beta, memory, cu_seqlens)


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
    """Apply the four steps to ``chunk_size`` tokens at once; see ``deltamoe.ops.kda``."""

    def in_chunks(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _chunk(*tensors, chunk_size=chunk_size)

    return _each_sequence(in_chunks, q, k, v, log_decay, beta, memory, cu_seqlens)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * log_decay[:, t, :, :, None].exp()  # forget
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], memory)  # recall
        delta = beta[:, t, :, None] * (v[:, t] - recalled)
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)  # correct
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))  # read
    return torch.stack(outputs, dim=1), memory


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    outputs, time = [], q.shape[1]
    per_head = [x.transpose(1, 2) for x in (q, k, v, log_decay, beta)]  # time next to last
    for start in range(0, time, chunk_size):
        q, k, v, log_decay, beta = (x[:, :, start : start + chunk_size] for x in per_head)
        output, memory = _advance_one_chunk(q, k, v, log_decay, beta, memory)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), memory


def _advance_one_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    beta = beta.unsqueeze(-1)  # [B, H, C, 1]
    survival = _survival(log_decay)  # [B, H, C, C, K]
    k_on_k = torch.einsum("...ik,...jk,...ijk->...ij", k, k, survival)  # [B, H, C, C]
    q_on_k = torch.einsum("...ik,...jk,...ijk->...ij", q, k, survival)  # [B, H, C, C]
    since_start = log_decay.cumsum(dim=-2).exp()  # [B, H, C, K]

    # delta_i = beta_i (v_i - recall from memory - recall from earlier deltas): triangular in i
    from_memory = beta * (v - (k * since_start) @ memory)  # [B, H, C, V]
    delta = torch.linalg.solve_triangular(
        (beta * k_on_k).tril(diagonal=-1), from_memory, upper=False, unitriangular=True
    )

    output = (q * since_start) @ memory + q_on_k @ delta  # [B, H, C, V]
    until_end = survival[..., -1, :, :]  # [B, H, C, K]
    memory = memory * since_start[..., -1, :, None] + (k * until_end).transpose(-1, -2) @ delta
    return output, memory


def _survival(log_decay: Tensor) -> Tensor:
    """How much of what step j wrote is left at step i: exp of the log-decays of j+1 .. i.

    Each sum is taken on its own. A difference of running sums would lose all digits once they
    are large, and is undefined when a step erases (log-decay -inf).
    """
    C = log_decay.shape[-2]
    ones = torch.ones(C, C, dtype=torch.bool, device=log_decay.device)
    steps = log_decay.unsqueeze(-2).expand(*log_decay.shape[:-1], C, -1)  # [..., m, j, K]
    after_j = steps.masked_fill(~ones.tril(diagonal=-1)[..., None], 0.0)
    sums = after_j.cumsum(dim=-3)  # [..., i, j, K]
    return sums.exp() * ones.tril()[..., None]


def _each_sequence(
    advance: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run ``advance`` on each packed sequence alone, in the computing dtype."""
    memory = initial_memory(q, v, memory, cu_seqlens)
    dtype = compute_dtype(q, v, memory)
    out_dtype, value_heads = v.dtype, v.shape[2]
    q, k = (repeat_heads(x.to(dtype), value_heads) for x in (q, k))
    v, log_decay, beta = (x.to(dtype) for x in (v, log_decay, beta))
    time = q.shape[1]
    if cu_seqlens is None:
        spans = [(0, time)]
        memories = [memory]
    else:
        borders = cu_seqlens.tolist()
        spans = list(pairwise(borders))
        memories = list(memory.split(1))
    outputs, finals = [], []
    for (start, stop), before in zip(spans, memories, strict=True):
        if start == stop:
            outputs.append(v[:, start:stop])
            finals.append(before)
            continue
        output, after = advance(*(x[:, start:stop] for x in (q, k, v, log_decay, beta)), before)
        outputs.append(output)
        finals.append(after)
    return torch.cat(outputs, dim=1).to(out_dtype), torch.cat(finals, dim=0)
