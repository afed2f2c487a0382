"""Norms: each computes in fp32 (fp64 for fp64 inputs) and returns its input's dtype."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["l2_normalize", "rms_norm"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """Scale each vector to root-mean-square 1, then by ``weight``; eps joins the mean square."""
    wide = _wide(x)
    normalized = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalized.to(x.dtype) * weight.to(x.dtype)


def l2_normalize(x: Float[Tensor, "*batch K"], eps: float = 1e-6) -> Float[Tensor, "*batch K"]:
    """Scale each vector to length 1; eps joins the sum of squares, as in the published kernels.

    Returns fp32 (fp64 for fp64 inputs): what follows is KDA, which computes in that dtype.
    """
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)
