"""The router: which experts a token visits, and how much each answer counts.

All of it is fp32 (fp64 in an fp64 model), so that a tie between experts does not depend on the
precision of the rest. The balance bias chooses and, unless ``has_biased_weights``, never weighs.
Source: docs/moe.md; Shazeer 2017 (arXiv 1701.06538), Switch (arXiv 2101.03961), DeepSeek-V3
(arXiv 2412.19437), Kimi Linear (arXiv 2510.26692).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltamoe.config.model import MoeConfig
from deltamoe.ops.experts import choose_experts

__all__ = ["Router", "Routing"]


class Routing(NamedTuple):
    """What the router decided for N tokens.

    Attributes:
        logits: [N, E] fp32, before any noise.
        scores: [N, E] fp32, sigmoid or softmax of the (noisy) logits.
        expert_ids: [N, A] the chosen experts, best first; ties go to the lower index.
        expert_weights: [N, A] fp32, what each chosen expert's answer is multiplied by.
        counts: [E] int64, tokens that chose each expert (dropped ones too).
        num_dropped: [] int64, assignments an expert over capacity turned away.
    """

    logits: Tensor
    scores: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    counts: Tensor
    num_dropped: Tensor


class Router(nn.Module):
    """Scores every expert for every token and chooses the best few."""

    balance_bias: Tensor

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        if config.has_noisy_topk:
            self.noise_proj = nn.Linear(dim, config.num_experts, bias=False)
        if config.has_balance_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("balance_bias", bias)

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """Choose ``experts_per_token`` experts for each token."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide)
            if self.training and c.router_jitter:
                x = x * torch.empty_like(x).uniform_(1 - c.router_jitter, 1 + c.router_jitter)
            logits = F.linear(x, self.weight.to(wide))
            noisy = logits
            if self.training and c.has_noisy_topk:
                spread = F.softplus(F.linear(x, self.noise_proj.weight.to(wide)))
                noisy = logits + torch.randn_like(logits) * spread
            scores = noisy.sigmoid() if c.scoring == "sigmoid" else noisy.softmax(dim=-1)
            with torch.no_grad():
                preference = self.preference(noisy if c.scoring == "topk_softmax" else scores)
            return self.decide(logits, noisy, scores, preference)

    def preference(self, scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """What experts are chosen by: scores plus balance bias, -inf in a group that is closed.

        Args:
            scores: what the choice begins with; for "topk_softmax" the logits.
        """
        c = self.config
        preference = scores
        if c.has_balance_bias:
            preference = preference + self.balance_bias.to(preference.dtype)
        if c.num_groups > 1:
            groups = preference.unflatten(-1, (c.num_groups, -1))
            best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
            best = best_two.sort(dim=-1, descending=True, stable=True).indices
            closed = torch.ones_like(best_two, dtype=torch.bool)
            closed.scatter_(-1, best[:, : c.groups_per_token], False)
            preference = groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        return preference

    def decide(self, logits: Tensor, noisy: Tensor, scores: Tensor, preference: Tensor) -> Routing:
        """Choose the experts preferred most and weigh them; all are [N, E]."""
        c = self.config
        expert_ids = choose_experts(preference, c.experts_per_token)
        return Routing(
            logits,
            scores,
            expert_ids,
            self._weigh(noisy, scores, expert_ids),
            torch.bincount(expert_ids.flatten(), minlength=c.num_experts),
            torch.zeros((), dtype=torch.int64, device=scores.device),
        )

    def _weigh(self, logits: Tensor, scores: Tensor, expert_ids: Tensor) -> Tensor:
        c = self.config
        if c.scoring == "topk_softmax":
            weights = logits.gather(-1, expert_ids).softmax(dim=-1)
        else:
            if c.has_biased_weights:
                scores = scores + self.balance_bias.to(scores.dtype)
            weights = scores.gather(-1, expert_ids)
            # with one expert a token, renormalising would cut the router off from the gradient
            if c.renormalize and c.experts_per_token > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * c.routed_scale
