"""Sparse experts: sort tokens by expert, run the grouped products, weigh and add back.

Lives here: ``dispatch`` and ``combine`` (index work), ``run_experts``, and one file a backend.
May import: ``deltamoe.errors`` and ``deltamoe.ops.backend``.
Read first: ``reference.py``.
"""

from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.experts.dispatch import Routed, combine, dispatch

__all__ = ["Routed", "combine", "dispatch", "run_experts"]


def run_experts(
    tokens: Float[Tensor, "R D"],
    counts: Int[Tensor, "E"],
    w_gate: Float[Tensor, "E F D"] | None,
    w_up: Float[Tensor, "E F D"],
    w_down: Float[Tensor, "E D F"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "R D"]:
    """Answer every routed row with its own expert.

    Args:
        tokens: rows sorted by expert: the first ``counts[0]`` are expert 0's, and so on.
        counts: rows of each expert; they sum to R.
        w_gate: SwiGLU's first half; None makes the expert a plain two-matrix FFN with a GELU.
        w_up, w_down: the other matrices.
        backend: a name from ``deltamoe backends``, or "auto".

    Returns:
        ``w_down (silu(w_gate x) * (w_up x))``, or ``w_down gelu(w_up x)``, row by row.
    """
    module = select("experts", backend, tokens.device.type, tokens.dtype)
    result: Tensor = module.run_experts(tokens, counts, w_gate, w_up, w_down)
    return result
