"""Cross entropy in PyTorch, the definition: any device, any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy_"]


def cross_entropy_(
    logits: Tensor, targets: Tensor, no_target: int, gradient_scale: float | None
) -> Tensor:
    """Return each row's loss; see ``deltamoe.ops.cross_entropy``."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    losses = F.nll_loss(logs, targets, ignore_index=no_target, reduction="none")
    if gradient_scale is not None:
        is_valid = targets != no_target
        share = logs.exp_()
        share[is_valid.nonzero().squeeze(1), targets[is_valid]] -= 1.0
        logits.copy_(share.mul_(gradient_scale).masked_fill_(~is_valid[:, None], 0.0))
    return losses
