"""Norms in PyTorch's operations: the definition, on any device and in any dtype."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["add_rms_norm", "gated_rms_norm", "l2_normalize", "rms_norm"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch D"]:
    """Scale each vector to root-mean-square 1, then by ``weight``."""
    dtype = dtype or x.dtype
    wide = _wide(x)
    normalized = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalized.to(dtype) * weight.to(dtype)


def add_rms_norm(
    x: Float[Tensor, "*batch D"],
    branch: Float[Tensor, "*batch D"] | None,
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """``x + branch``, and its norm."""
    total = x if branch is None else x + branch
    return total, rms_norm(total, weight, eps, dtype=dtype)


def gated_rms_norm(
    x: Float[Tensor, "*batch D"],
    logits: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    activation: str,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch D"]:
    """``rms_norm(x) * activation(logits)``."""
    wide = _wide(logits)
    opening = torch.sigmoid(wide) if activation == "sigmoid" else F.silu(wide)
    return (rms_norm(_wide(x), weight, eps) * opening).to(dtype or x.dtype)


def l2_normalize(x: Float[Tensor, "*batch K"], eps: float = 1e-6) -> Float[Tensor, "*batch K"]:
    """Scale each vector to length 1; eps joins the sum of squares, as in the published kernels.

    Returns fp32 (fp64 for fp64 inputs): what follows is KDA, which computes in that dtype.
    """
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)
