"""The dense channel, and the shared expert: one MLP for every token."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """``w_down (silu(w_gate x) * (w_up x))``; without ``w_gate``, ``w_down gelu(w_up x)``."""

    def __init__(self, dim: int, hidden_dim: int, *, is_swiglu: bool = True) -> None:
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden_dim, bias=False) if is_swiglu else None
        self.w_up = nn.Linear(dim, hidden_dim, bias=False)
        self.w_down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Work on each token alone."""
        up: Tensor = self.w_up(x)
        hidden = F.gelu(up) if self.w_gate is None else F.silu(self.w_gate(x)) * up
        out: Tensor = self.w_down(hidden)
        return out
