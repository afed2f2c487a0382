"""The sparse channel: route, dispatch, answer, combine, and the experts everyone visits.

Source: docs/moe.md; Kimi Linear (arXiv 2510.26692), DeepSeek-V3 (arXiv 2412.19437).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltamoe.config.model import MoeConfig
from deltamoe.layers.mlp import Mlp
from deltamoe.layers.router import Router, Routing
from deltamoe.ops.experts import combine, dispatch, run_experts

__all__ = ["Experts", "Moe"]


class Experts(nn.Module):
    """The matrices of all routed experts, stacked along E."""

    w_gate: nn.Parameter | None

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.backend = "auto"
        E, F = config.num_experts, config.expert_dim
        self.w_gate = nn.Parameter(torch.empty(E, F, dim)) if config.expert == "swiglu" else None
        self.w_up = nn.Parameter(torch.empty(E, F, dim))
        self.w_down = nn.Parameter(torch.empty(E, dim, F))

    def forward(
        self, tokens: Float[Tensor, "R D"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "R D"]:
        """Answer rows that are sorted by expert."""
        gate: Tensor | None = self.w_gate
        up: Tensor = self.w_up
        down: Tensor = self.w_down
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
            tokens, up, down = tokens.to(dtype), up.to(dtype), down.to(dtype)
            gate = None if gate is None else gate.to(dtype)
        return run_experts(tokens, counts, gate, up, down, backend=self.backend)


class Moe(nn.Module):
    """A mixture of experts: each token visits a few, and the shared one."""

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        is_swiglu = config.expert == "swiglu"
        self.router = Router(dim, config)
        self.experts = Experts(dim, config)
        self.shared_expert = (
            Mlp(dim, config.shared_dim, is_swiglu=is_swiglu) if config.shared_dim else None
        )

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Routing]:
        """Work on each token with the experts it chose.

        While training, ``capacity_factor`` bounds what one expert takes of this call's tokens;
        in evaluation nothing is dropped, so a token's answer never depends on its neighbours.
        """
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens)
        routed = dispatch(
            tokens, routing.expert_ids, self.config.num_experts, self._capacity(len(tokens))
        )
        answers = self.experts(routed.tokens, routed.counts)
        y = combine(answers, routed, routing.expert_weights).to(x.dtype).view_as(x)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        dropped = routing.counts.sum() - routed.counts.sum()
        return y, routing._replace(num_dropped=dropped)

    def _capacity(self, num_tokens: int) -> int | None:
        c = self.config
        if c.capacity_factor is None or not self.training:
            return None
        return math.ceil(c.capacity_factor * num_tokens * c.experts_per_token / c.num_experts)
