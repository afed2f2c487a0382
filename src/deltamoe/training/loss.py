"""Cross entropy of the next token, without ever holding all logits of a large batch.

The sum over the targets is divided by the number of targets of the *whole step*, given by the
caller, so that cutting a step into micro-batches changes nothing but rounding. Knows of the model
only the head's matrix.

The loss is the last thing a model computes, so its gradient needs nothing that comes later: the
forward pass takes some rows through the head, turns their logits into the logits' gradient in
place, and multiplies that back. Each logit exists once, for a moment, near the core.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.data import NO_TARGET
from deltamoe.ops.cross_entropy import cross_entropy_

__all__ = ["next_token_loss"]

SLICE_LOGITS = 2**22
"""Logits held at once, in the precision of the products."""

MIN_ROWS = 128
"""Rows of a slice at least: each slice reads the head twice and its gradient once."""


def next_token_loss(hidden: Tensor, targets: Tensor, head: Tensor, *, num_targets: int) -> Tensor:
    """The sum of the targets' cross entropies over ``num_targets``, in nats, as a scalar.

    Args:
        hidden: [N, D], the model's last hidden vectors.
        targets: [N] int64; ``NO_TARGET`` where nothing is to be predicted.
        head: [vocab, D], one row a token of the vocabulary (``HybridLM.head_weight``).
        num_targets: valid targets of the whole step, over all its micro-batches; > 0.

    Returns:
        fp32 (fp64 for an fp64 model). Under autocast the products are in its dtype; losses and
        the head's gradient are summed in fp32.
    """
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, num_targets, dtype, torch.is_grad_enabled()
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        num_targets: int,
        dtype: torch.dtype,
        has_gradient: bool,
    ) -> Tensor:
        has_gradient = has_gradient and any(ctx.needs_input_grad)
        wide = torch.promote_types(dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if has_gradient else None
        d_head = torch.zeros_like(head, dtype=wide) if has_gradient else None
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        rows = max(MIN_ROWS, SLICE_LOGITS // len(head))
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            buffer = weight.new_empty(min(rows, len(hidden)), len(head))
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                some = hidden[part].to(dtype)
                logits = torch.mm(some, weight.mT, out=buffer[: len(some)])
                scale = 1.0 / num_targets if has_gradient else None
                losses[part] = cross_entropy_(
                    logits, targets[part], no_target=NO_TARGET, gradient_scale=scale
                )
                if d_hidden is not None and d_head is not None:
                    d_hidden[part] = logits @ weight
                    if dtype == wide:
                        d_head.addmm_(logits.mT, some)
                    else:
                        d_head += logits.mT @ some
        if d_hidden is not None and d_head is not None:
            ctx.save_for_backward(d_hidden, d_head)
            ctx.head_dtype = head.dtype
        return losses.sum() / num_targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        d_head = d_head * d_loss
        return (
            d_hidden * d_loss.to(d_hidden.dtype),
            d_head.to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )
