"""The decay in PyTorch's operations: the definition, on any device and in any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamoe.ops.kda.shapes import compute_dtype

__all__ = ["kda_decay"]


def kda_decay(
    logits: Tensor, A_log: Tensor, dt_bias: Tensor, *, lower_bound: float | None = None
) -> Tensor:
    """Turn decay logits into log_decay <= 0."""
    dtype = compute_dtype(logits)
    shifted = logits.to(dtype) + dt_bias.to(dtype).view(logits.shape[-2:])
    rate = A_log.to(dtype).exp()[:, None]
    if lower_bound is None:
        return -rate * F.softplus(shifted)
    return lower_bound * torch.sigmoid(rate * shifted)
