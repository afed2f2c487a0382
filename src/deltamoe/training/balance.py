"""What keeps the experts evenly busy: auxiliary losses, the bias update, and two alarms.

The losses are functions of one ``Routing`` and get their coefficient from the caller. The bias
update works on counts summed over *everything one optimizer step saw*: all micro-batches (and, in
a distributed run, all ranks). Knows nothing of models or optimizers.

Letters: N tokens, E experts, A experts per token (docs/notation.md).
Source: Switch Transformer (arXiv 2101.03961) eq. 4; ST-MoE (arXiv 2202.08906) eq. 5;
DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; Moonlight (arXiv 2502.16982) for the centred update.
"""

from typing import Literal

import torch
from torch import Tensor

from deltamoe.model import Routing

__all__ = [
    "load_balance_loss",
    "max_violation",
    "num_dead_experts",
    "sequence_balance_loss",
    "update_balance_bias",
    "z_loss",
]


def load_balance_loss(routing: Routing) -> Tensor:
    """Switch's loss, E sum_i f_i P_i over the micro-batch: 1 under perfect balance, at most E.

    f_i is the share of the N·A assignments that went to expert i (no gradient), P_i its mean
    share of a token's scores. Assignments count before any is dropped for capacity.
    """
    one_sequence = torch.tensor([0, len(routing.scores)], device=routing.scores.device)
    return sequence_balance_loss(routing, one_sequence)


def sequence_balance_loss(routing: Routing, cu_seqlens: Tensor) -> Tensor:
    """DeepSeek-V3's loss: the same expression within each sequence, averaged over tokens.

    The average weighs a sequence by its length, so that a scrap of three tokens is not as loud
    as a full row; for sequences of one length this is the paper's mean over sequences.

    Args:
        routing: of N tokens.
        cu_seqlens: [num_sequences + 1], where each sequence starts, and N.
    """
    num_tokens, num_experts = routing.scores.shape
    experts_per_token = routing.expert_ids.shape[1]
    lengths = cu_seqlens.diff()  # [num_sequences]
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=num_tokens
    )  # [N]
    probabilities = routing.scores / routing.scores.sum(dim=-1, keepdim=True)  # [N, E]
    sums = probabilities.new_zeros(len(lengths), num_experts).index_add(0, sequence, probabilities)
    slots = sequence[:, None] * num_experts + routing.expert_ids  # [N, A]
    counts = torch.bincount(slots.flatten(), minlength=sums.numel()).view_as(sums)
    # With n tokens, n sum_i f_i P_i = E / (A n) sum_i count_i sum_i: divide by n once more below.
    per_sequence = (counts * sums).sum(dim=-1) / lengths.clamp(min=1)
    return num_experts / (experts_per_token * num_tokens) * per_sequence.sum()


def z_loss(routing: Routing) -> Tensor:
    """ST-MoE's loss: the mean squared log-partition of the router's logits."""
    return routing.logits.logsumexp(dim=-1).square().mean()


@torch.no_grad()
def update_balance_bias(
    bias: Tensor, counts: Tensor, *, rule: Literal["sign", "centered_sign", "none"], rate: float
) -> None:
    """Move each expert's selection bias by ``rate`` toward an even load, in place.

    Args:
        bias: [E] fp32.
        counts: [E], assignments of the whole step.
        rule: "sign" is b_i += rate sign(mean - n_i); "centered_sign" takes the mean off those
            signs, which keeps the mean bias where it is; "none" leaves the bias alone.
        rate: the size of the move.
    """
    if rule == "none":
        return
    load = counts.to(bias.dtype)
    move = torch.sign(load.mean() - load)
    if rule == "centered_sign":
        move = move - move.mean()
    bias.add_(move, alpha=rate)


def max_violation(counts: Tensor) -> float:
    """MaxVio: how far the busiest expert is above the mean; 0 is perfect balance."""
    mean = counts.double().mean().item()
    return counts.max().item() / mean - 1.0 if mean > 0 else 0.0


def num_dead_experts(counts: Tensor) -> int:
    """Experts that no token chose."""
    return int((counts == 0).sum())
