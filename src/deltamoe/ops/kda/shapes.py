"""What every KDA backend may rely on: shapes that fit, and one computing dtype."""

import torch
from torch import Tensor

__all__ = ["check_shapes", "compute_dtype", "initial_memory", "repeat_heads"]


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse inputs that do not fit together, naming the first that does not."""

    def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")

    batch, time, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    if value_heads % heads:
        raise ValueError(f"v has {value_heads} heads; expected a multiple of q's {heads}")
    expect("k", k, (batch, time, heads, key_dim))
    expect("v", v, (batch, time, value_heads, value_dim))
    expect("log_decay", log_decay, (batch, time, value_heads, key_dim))
    expect("beta", beta, (batch, time, value_heads))
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs sequences along T: B must be 1, not {batch}")
        borders = cu_seqlens.tolist()
        if len(borders) < 2 or borders[0] != 0 or borders[-1] != time or sorted(borders) != borders:
            raise ValueError(
                f"cu_seqlens must rise from 0 to T = {time}; got {borders[:3]} ... {borders[-2:]}"
            )
        sequences = len(borders) - 1
    if memory is not None:
        expect("memory", memory, (sequences, value_heads, key_dim, value_dim))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32: KDA's sums are never kept in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def initial_memory(
    q: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Return ``memory`` in the computing dtype, or zeros [N, HV, K, V]."""
    dtype = compute_dtype(q, v)
    if memory is not None:
        return memory.to(torch.promote_types(dtype, memory.dtype))
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)


def repeat_heads(x: Tensor, value_heads: int) -> Tensor:
    """Give each value head its query/key head: [B, T, H, K] -> [B, T, HV, K]."""
    times = value_heads // x.shape[2]
    return x if times == 1 else x.repeat_interleave(times, dim=2)
