"""Causal attention in PyTorch's operations: the definition, on any device and in any dtype."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamoe.ops.rows import inverse_of, move_rows

__all__ = ["causal_attention"]


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
    heads = q.shape[2]
    k_shared = k_shared.unsqueeze(2).expand(-1, -1, heads, -1)
    queries = torch.cat([q, q_shared.to(q.dtype)], dim=-1)
    keys = torch.cat([k, k_shared.to(k.dtype)], dim=-1)
    if cu_seqlens is None:
        return _attend(queries, keys, v)
    return _attend_packed(queries, keys, v, cu_seqlens)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, channels], a sequence a row."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    value_dim = v.shape[-1]
    # PyTorch's kernels that never hold T x T scores want all heads of one size.
    size = max(q.shape[-1], value_dim)
    q, k, v = (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out[..., :value_dim].transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sequences of one length are attended together, so a batch of equal rows costs one call."""
    starts_of: dict[int, list[int]] = {}
    for start, stop in pairwise(cu_seqlens.tolist()):
        if stop > start:
            starts_of.setdefault(stop - start, []).append(start)
    if not starts_of:
        return v
    if len(starts_of) == 1:  # nothing to sort
        length = next(iter(starts_of))
        q, k, v = (x.unflatten(1, (-1, length))[0] for x in (q, k, v))
        return _attend(q, k, v).flatten(0, 1).unsqueeze(0)
    by_length = torch.cat([_spans(starts, n, v.device) for n, starts in starts_of.items()])
    in_order = inverse_of(by_length, v.shape[1])
    q, k, v = (move_rows(x[0], by_length, in_order) for x in (q, k, v))
    parts, done = [], 0
    for length, starts in starts_of.items():
        size = length * len(starts)
        rows = (x[done : done + size].unflatten(0, (-1, length)) for x in (q, k, v))
        parts.append(_attend(*rows).flatten(0, 1))
        done += size
    return move_rows(torch.cat(parts), in_order, by_length).unsqueeze(0)


def _spans(starts: list[int], length: int, device: torch.device) -> Tensor:
    """The positions start .. start + length - 1 for each start, one after the other."""
    offsets = torch.arange(length, device=device)
    return (torch.tensor(starts, device=device)[:, None] + offsets).flatten()
