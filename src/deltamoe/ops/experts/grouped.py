"""Experts through PyTorch's grouped matrix product: one kernel for all experts.

Its inner sizes must be multiples of 16 bytes; rows behind the last segment would be left
uninitialised, so there are none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["run_experts"]


def run_experts(
    tokens: Tensor, counts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Answer every routed row with its own expert; see ``deltamoe.ops.experts``."""
    ends = counts.cumsum(0).to(torch.int32)
    up = _grouped(tokens, w_up, ends)
    hidden = F.gelu(up) if w_gate is None else F.silu(_grouped(tokens, w_gate, ends)) * up
    return _grouped(hidden, w_down, ends)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # the product's backward refuses gradients with a stride of 0, such as an expanded sum's
    product: Tensor = F.grouped_mm(x, weight.transpose(-1, -2), offs=ends)
    result: Tensor = _Contiguous.apply(product)  # type: ignore[no-untyped-call]
    return result


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
