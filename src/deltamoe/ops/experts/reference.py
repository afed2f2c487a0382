"""Experts, the definition: every row is multiplied by its own expert's matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["run_experts"]


def run_experts(
    tokens: Tensor, counts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Answer every routed row with its own expert; see ``deltamoe.ops.experts``."""
    expert = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    up = torch.einsum("rd,rfd->rf", tokens, w_up[expert])
    if w_gate is None:
        hidden = F.gelu(up)
    else:
        hidden = F.silu(torch.einsum("rd,rfd->rf", tokens, w_gate[expert])) * up
    return torch.einsum("rf,rdf->rd", hidden, w_down[expert])
