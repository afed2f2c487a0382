"""Feed-forward experts: sort tokens by expert, run the grouped products, weigh and add back.

Lives here: ``choose_experts``; ``mix_experts``, all that follows it, with its parts ``dispatch``,
``run_experts`` and ``combine``; ``feed_forward``, the one expert that everyone visits; and one file
a backend. The CPU's ``native.py`` does the whole in one pass over ``ops/native/experts.cpp``; the
others do the products, between ``dispatch`` and ``combine``.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
Read first: ``reference.py``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.experts.dispatch import Routed, combine, dispatch

__all__ = [
    "Routed",
    "choose_experts",
    "combine",
    "dispatch",
    "feed_forward",
    "mix_experts",
    "run_experts",
]


def choose_experts(
    preferences: Float[Tensor, "N E"], num_choices: int, *, backend: str = "auto"
) -> Int[Tensor, "N A"]:
    """Return the experts each token prefers, best first; equals go to the lower index."""
    module = select("experts", backend, preferences.device.type, preferences.dtype)
    if hasattr(module, "choose_experts") and preferences.dtype == torch.float32:
        chosen: Tensor = module.choose_experts(preferences, num_choices)
        return chosen
    # a stable sort, not topk: equal scores must always choose the same expert
    ranked = preferences.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :num_choices].contiguous()


def mix_experts(
    x: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N A"],
    expert_weights: Float[Tensor, "N A"],
    w_gate: Float[Tensor, "E F D"] | None,
    w_up: Float[Tensor, "E F D"],
    w_down: Float[Tensor, "E D F"],
    *,
    capacity: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "N D"], Int[Tensor, "E"]]:
    """Answer each token by its own experts, weighted.

    Args:
        x: tokens.
        expert_ids, capacity: as in ``dispatch``.
        expert_weights: what each chosen expert's answer is multiplied by.
        w_gate, w_up, w_down: as in ``run_experts``.
        dtype: of the products' operands; None means that of ``x`` and the matrices. Sums are in
            fp32 at least.
        backend: a name from ``deltamoe backends``, or "auto".

    Returns:
        Answers in x's dtype, and the rows of each expert that were not dropped.
    """
    dtype = dtype or torch.promote_types(x.dtype, w_up.dtype)
    module = select("experts", backend, x.device.type, dtype)
    if hasattr(module, "mix_experts"):
        y, counts = module.mix_experts(
            x, expert_ids, expert_weights, w_gate, w_up, w_down, capacity, dtype
        )
        return y, counts
    routed = dispatch(x.to(dtype), expert_ids, len(w_up), capacity)
    gate = None if w_gate is None else w_gate.to(dtype)
    answers = module.run_experts(
        routed.tokens, routed.counts, gate, w_up.to(dtype), w_down.to(dtype)
    )
    return combine(answers, routed, expert_weights).to(x.dtype), routed.counts


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


def feed_forward(
    x: Float[Tensor, "*batch D"],
    w_gate: Float[Tensor, "F D"] | None,
    w_up: Float[Tensor, "F D"],
    w_down: Float[Tensor, "D F"],
) -> Float[Tensor, "*batch D"]:
    """Answer every token by one expert; the arguments are those of ``run_experts``, without E.

    Under autocast the products are in its dtype.
    """
    dtype = torch.promote_types(x.dtype, w_up.dtype)
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if not torch.compiler.is_compiling():  # it traces PyTorch's operations, and fuses them itself
        module = select("experts", "auto", x.device.type, dtype)
        if hasattr(module, "feed_forward"):
            result: Tensor = module.feed_forward(x, w_gate, w_up, w_down, dtype)
            return result
    up = F.linear(x, w_up)
    hidden = F.gelu(up) if w_gate is None else F.silu(F.linear(x, w_gate)) * up
    return F.linear(hidden, w_down)
