"""Kimi Delta Attention as two functions and the activation that feeds them.

Lives here: ``kda_recurrent`` and ``kda_chunk`` (one function of their inputs, two ways to compute
it), ``kda_decay``, and one file a backend.
May import: ``deltamoe.errors`` and ``deltamoe.ops.backend``.
Read first: ``reference.py``, then docs/kda.md, then ``dyadic.py``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.kda.decay import kda_decay
from deltamoe.ops.kda.shapes import check_shapes

__all__ = ["kda_chunk", "kda_decay", "kda_recurrent"]


def kda_recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    log_decay: Float[Tensor, "B T HV K"],
    beta: Float[Tensor, "B T HV"],
    memory: Float[Tensor, "N HV K V"] | None = None,
    *,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"]]:
    """Run KDA token by token: the definition, and the way to decode.

    Args:
        q: queries, l2-normalised along K and carrying the 1/sqrt(K) scale.
        k: keys, l2-normalised along K.
        v: values. There may be more value heads than query/key heads (a multiple): value head j
            reads query/key head ``j // (HV / H)``.
        log_decay: natural log of the per-step, per-channel retention, <= 0. Zero keeps, -inf
            erases.
        beta: write strength, in (0, 1) (up to 2 with negative eigenvalues); activated.
        memory: what the heads remember, fp32 (fp64 for fp64 inputs); None starts from zeros.
            N is B, or the number of sequences when ``cu_seqlens`` is given.
        cu_seqlens: borders of sequences packed along T (B must be 1): int64,
            ``[0, end_0, end_1, ..., T]``, not decreasing. The memory starts anew at each border.
        backend: a name from ``deltamoe backends``, or "auto".

    Returns:
        Outputs in v's dtype, and the memory after the last token: fp32 (fp64 for fp64 inputs).
        With T = 0 the memory comes back as it was.

    Raises:
        ValueError: the shapes do not fit together; the message names the tensor.
        BackendUnavailableError: ``backend`` was named and cannot run here.

    Cost: O(T K V) time, sequential in T, per head.
    Source: Kimi Linear (arXiv 2510.26692), equation 1.
    """
    check_shapes(q, k, v, log_decay, beta, memory, cu_seqlens)
    module = select("kda", backend, q.device.type, v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = module.kda_recurrent(
            q, k, v, log_decay, beta, memory, cu_seqlens=cu_seqlens
        )
    return result


def kda_chunk(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    log_decay: Float[Tensor, "B T HV K"],
    beta: Float[Tensor, "B T HV"],
    memory: Float[Tensor, "N HV K V"] | None = None,
    *,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"]]:
    """Run KDA over many tokens at once; the same function as ``kda_recurrent``.

    Args:
        q, k, v, log_decay, beta, memory, cu_seqlens, backend: as in ``kda_recurrent``.
        chunk_size: tokens in one chunk, C; changes speed and rounding, never the meaning.
            Backends may take the nearest size below that suits them.

    Returns:
        As ``kda_recurrent``.

    Raises:
        ValueError: ``chunk_size`` < 1, or the shapes do not fit together.
        BackendUnavailableError: ``backend`` was named and cannot run here.

    Cost: O(T C (K + V) + T K V) time and, in every backend but the reference,
    O(T (C + K + V) + T K V / C) memory, per head.
    Source: Kimi Linear (arXiv 2510.26692), section 3.1; derivation in docs/kda.md.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: expected a whole number >= 1")
    check_shapes(q, k, v, log_decay, beta, memory, cu_seqlens)
    module = select("kda", backend, q.device.type, v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = module.kda_chunk(
            q, k, v, log_decay, beta, memory, cu_seqlens=cu_seqlens, chunk_size=chunk_size
        )
    return result
