"""RMSNorm as a module: one weight a channel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltamoe.ops.norm import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Scale each vector to root-mean-square 1, computed in fp32, times a learned weight.

    Under autocast the result has autocast's dtype: what follows a norm are matrices, which would
    each round it again.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last axis."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return rms_norm(x, self.weight, self.eps, dtype=dtype)
