"""Cross entropy of the next token, without ever holding all logits of a large batch.

The sum over the targets is divided by the number of targets of the *whole step*, given by the
caller, so that cutting a step into micro-batches changes nothing but rounding. Knows of the model
only a head: a function from hidden vectors to logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deltamoe.data import NO_TARGET

__all__ = ["next_token_loss"]

SLICE_LOGITS = 2**24
"""Logits held at once; 64 MiB in fp32."""


def next_token_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    num_targets: int,
    vocab_size: int,
) -> Tensor:
    """The sum of the targets' cross entropies over ``num_targets``, in nats, as an fp32 scalar.

    Args:
        hidden: [N, D], the model's last hidden vectors.
        targets: [N] int64; ``NO_TARGET`` where nothing is to be predicted.
        head: [n, D] -> logits [n, vocab].
        num_targets: valid targets of the whole step, over all its micro-batches; > 0.
        vocab_size: columns of the logits; decides how many rows go through the head at once.

    Cost: if the logits are many, each slice's are computed again in the backward pass.
    """
    num_rows = max(1, SLICE_LOGITS // vocab_size)
    if len(hidden) <= num_rows:
        return _sum_of_losses(hidden, targets, head) / num_targets
    slices = zip(torch.split(hidden, num_rows), torch.split(targets, num_rows), strict=True)
    sums = [
        checkpoint(_sum_of_losses, part, wanted, head, use_reentrant=False)
        for part, wanted in slices
    ]
    return torch.stack(sums).sum() / num_targets


def _sum_of_losses(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=NO_TARGET, reduction="sum")
