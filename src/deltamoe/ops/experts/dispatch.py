"""Who goes where: sorting token copies by expert and adding the answers back.

Letters: N tokens, E experts, A experts per token, R routed rows (N A, less what was dropped).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.rows import inverse_of, move_rows

__all__ = ["Routed", "combine", "dispatch"]


class Routed(NamedTuple):
    """Token copies in the order of their experts.

    Attributes:
        tokens: [R, D], sorted by expert; within an expert first choices come first.
        counts: [E] rows of each expert.
        rows: [N, A] where each assignment's row is; R for one that was dropped.
        assignments: [R] the inverse: ``n A + a`` of the assignment a row belongs to.
    """

    tokens: Tensor
    counts: Tensor
    rows: Tensor
    assignments: Tensor


def dispatch(
    x: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N A"],
    num_experts: int,
    capacity: int | None = None,
) -> Routed:
    """Copy each token once for each expert it visits, sorted by expert.

    Args:
        x: tokens.
        expert_ids: the experts of each token, best first, in [0, E).
        num_experts: E.
        capacity: rows an expert takes at most; None takes all (dropless). When an expert is
            full, second choices are dropped before first choices and late tokens before early.
    """
    N, A = expert_ids.shape
    by_rank = expert_ids.t().flatten()  # all first choices, then all second ones, ...
    order = torch.argsort(by_rank, stable=True)
    counts = torch.bincount(by_rank, minlength=num_experts)
    if capacity is not None:
        starts = counts.cumsum(0) - counts
        place = torch.arange(N * A, device=x.device) - starts[by_rank[order]]
        order = order[place < capacity]
        counts = counts.clamp(max=capacity)
    assignments = order % N * A + order // N
    rows = inverse_of(assignments, N * A)
    copies = x.unsqueeze(1).expand(-1, A, -1).flatten(0, 1)  # [N A, D]
    return Routed(move_rows(copies, assignments, rows), counts, rows.view(N, A), assignments)


def combine(
    answers: Float[Tensor, "R D"], routed: Routed, weights: Float[Tensor, "N A"]
) -> Float[Tensor, "N D"]:
    """Sum each token's answers by its weights, in the weights' dtype (fp32); dropped ones add 0."""
    rows = move_rows(answers, routed.rows.flatten(), routed.assignments)
    chosen: Tensor = rows.unflatten(0, routed.rows.shape).to(weights.dtype)  # [N, A, D]
    return (chosen * weights.unsqueeze(-1)).sum(dim=1).to(answers.dtype)
