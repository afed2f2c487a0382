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
from deltamoe.ops.experts import mix_experts

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
        self, x: Float[Tensor, "N D"], routing: Routing, capacity: int | None = None
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, "E"]]:
        """Answer tokens by the experts they chose; also the rows that each expert kept."""
        dtype = None
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return mix_experts(
            x,
            routing.expert_ids,
            routing.expert_weights,
            self.w_gate,
            self.w_up,
            self.w_down,
            capacity=capacity,
            dtype=dtype,
            backend=self.backend,
        )


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
        answers, kept = self.experts(tokens, routing, self._capacity(len(tokens)))
        y = answers.view_as(x)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        dropped = routing.counts.sum() - kept.sum()
        return y, routing._replace(num_dropped=dropped)

    def _capacity(self, num_tokens: int) -> int | None:
        c = self.config
        if c.capacity_factor is None or not self.training:
            return None
        return math.ceil(c.capacity_factor * num_tokens * c.experts_per_token / c.num_experts)
