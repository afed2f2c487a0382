"""RMSNorm as a module: one weight a channel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltamoe.ops.norm import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Scale each vector to root-mean-square 1, computed in fp32, times a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)
