"""Experts as one matrix product for each expert that has rows; plain PyTorch, any device.

``unbind`` hands out the experts' matrices so that their gradients are stacked once; indexing
``w[e]`` would write a whole zero-filled [E, F, D] for every expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["run_experts"]


def run_experts(
    tokens: Tensor, counts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Answer every routed row with its own expert; see ``deltamoe.ops.experts``."""
    gates = (None,) * len(w_up) if w_gate is None else w_gate.unbind(0)
    segments = tokens.split(counts.tolist())
    answers = [
        _one_expert(rows, gate, up, down)
        for rows, gate, up, down in zip(
            segments, gates, w_up.unbind(0), w_down.unbind(0), strict=True
        )
        if len(rows)
    ]
    return torch.cat(answers) if answers else tokens.new_zeros(0, w_down.shape[1])


def _one_expert(x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor) -> Tensor:
    up = F.linear(x, w_up)
    hidden = F.gelu(up) if w_gate is None else F.silu(F.linear(x, w_gate)) * up
    return F.linear(hidden, w_down)
