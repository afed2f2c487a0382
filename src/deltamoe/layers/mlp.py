"""The dense channel, and the shared expert: one MLP for every token."""

from jaxtyping import Float
from torch import Tensor, nn

from deltamoe.ops.experts import feed_forward

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
        gate = None if self.w_gate is None else self.w_gate.weight
        return feed_forward(x, gate, self.w_up.weight, self.w_down.weight)
