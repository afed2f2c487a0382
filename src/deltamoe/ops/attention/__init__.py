"""Causal softmax attention whose keys have a part that all heads share.

    score[t, s] = (q[t] . k[s] + q_shared[t] . k_shared[s]) scale        s <= t, in one sequence

Lives here: the operator and, in ``reference.py``, its definition; the CPU's kernel is
``native.py`` over ``ops/native/attention.cpp``.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
"""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.attention import reference
from deltamoe.ops.backend import select

__all__ = ["causal_attention"]


def causal_attention(
    q: Float[Tensor, "B T H K"],
    q_shared: Float[Tensor, "B T H P"],
    k: Float[Tensor, "B T H K"],
    k_shared: Float[Tensor, "B T P"],
    v: Float[Tensor, "B T H V"],
    *,
    cu_seqlens: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Attend from each token to itself and those before it in its sequence.

    Args:
        q, q_shared: the two parts of the queries, unscaled.
        k, k_shared: the two parts of the keys; P may be 0.
        v: values.
        cu_seqlens: borders of sequences packed along T (B must be 1); None: rows are sequences.

    Returns:
        One value a query and head, in v's dtype. Scores are scaled by 1/sqrt(K + P).

    Cost: O(T^2 (K + P + V)) time and O(T) memory, per head.
    """
    result: Tensor = _backend(v).causal_attention(
        q, q_shared, k, k_shared, v, cu_seqlens=cu_seqlens
    )
    return result


def _backend(x: Tensor) -> ModuleType:
    if torch.compiler.is_compiling():
        return reference
    return select("attention", "auto", x.device.type, x.dtype)
