"""RMSNorm as a module: one weight a channel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltamoe.ops.norm import add_rms_norm, rms_norm

__all__ = ["RMSNorm", "StreamNorm"]


class _Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))


class RMSNorm(_Norm):
    """Scale each vector to root-mean-square 1, computed in fp32, times a learned weight.

    Under autocast the result has autocast's dtype: what follows a norm are matrices, which would
    each round it again.
    """

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps, dtype=_autocast_dtype(x))


class StreamNorm(_Norm):
    """Add a branch to the residual stream and normalise the sum as ``RMSNorm`` does."""

    def forward(
        self, x: Float[Tensor, "*batch D"], branch: Float[Tensor, "*batch D"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Return the stream with ``branch`` added, and that normalised over its last axis."""
        return add_rms_norm(x, branch, self.weight, self.eps, dtype=_autocast_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
