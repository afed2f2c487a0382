"""Who goes where: sorting token copies by expert and adding the answers back.

Letters: N tokens, E experts, A experts per token, R routed rows (N A, less what was dropped).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Routed", "combine", "dispatch"]


class Routed(NamedTuple):
    """Token copies in the order of their experts.

    Attributes:
        tokens: [R, D], sorted by expert; within an expert first choices come first.
        counts: [E] rows of each expert.
        rows: [N, A] where each assignment's row is; R for one that was dropped.
    """

    tokens: Tensor
    counts: Tensor
    rows: Tensor


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
    rows = torch.full((A * N,), len(order), dtype=torch.int64, device=x.device)
    rows[order] = torch.arange(len(order), device=x.device)
    return Routed(x[order % N], counts, rows.view(A, N).t())


def combine(
    answers: Float[Tensor, "R D"], rows: Int[Tensor, "N A"], weights: Float[Tensor, "N A"]
) -> Float[Tensor, "N D"]:
    """Sum each token's answers by its weights, in the weights' dtype (fp32); dropped ones add 0."""
    if answers.shape[0] < rows.numel():
        answers = torch.cat([answers, answers.new_zeros(1, answers.shape[1])])
    chosen = answers[rows.flatten()].view(*rows.shape, -1)  # [N, A, D]
    return torch.einsum("nad,na->nd", chosen.to(weights.dtype), weights).to(answers.dtype)
