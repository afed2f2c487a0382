"""KDA through flash-linear-attention's Triton kernels; CUDA only, optional (``deltamoe[cuda]``).

The kernels take bf16 or fp16 (fp32 works, slower), keep the memory in fp32 and know chunks of 32
and 64. They form differences of running sums of the log-decay, so a step that erases (-inf)
enters as a step that keeps e^-100 of the memory: nothing, in fp32.
Source: fla-core, ``fla.ops.kda`` (0.5.2 or newer).
"""

import torch
from torch import Tensor

from deltamoe.ops.kda.shapes import initial_memory

__all__ = ["kda_chunk", "kda_recurrent"]

_ERASE = -100.0


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
    """Run token by token with the fused decoding kernel; it has no backward pass."""
    from fla.ops.kda import fused_recurrent_kda

    memory = initial_memory(q, v, memory, cu_seqlens)
    if v.shape[1] == 0:
        return v, memory
    out, final = fused_recurrent_kda(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        log_decay.clamp(min=_ERASE),
        beta,
        scale=1.0,
        initial_state=memory,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
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
    """Run over many tokens at once, forward and backward."""
    from fla.ops.kda import chunk_kda

    memory = initial_memory(q, v, memory, cu_seqlens)
    if v.shape[1] == 0:
        return v, memory
    out, final = chunk_kda(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        log_decay.clamp(min=_ERASE),
        beta,
        scale=1.0,
        initial_state=memory.to(torch.float32),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        chunk_size=32 if chunk_size < 64 else 64,
    )
    return out, final
