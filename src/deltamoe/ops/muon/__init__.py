"""Muon's update: each matrix moves by the nearest matrix with equal singular values.

    momentum <- momentum + (1 - beta) (gradient - momentum)
    direction = orthogonalize(gradient + beta (momentum - gradient))
    parameter <- (1 - lr weight_decay) parameter - 0.2 sqrt(max(rows, columns)) lr direction

Lives here: the operator and, in ``reference.py``, its definition; the CPU's kernel is
``native.py`` over ``ops/native/muon.cpp``. Knows matrices, not which parameters they are.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2; the momentum and the scale
are those of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.muon.reference import orthogonalize

__all__ = ["muon_step_", "orthogonalize"]


def muon_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    beta: float,
    dtype: torch.dtype,
    backend: str = "auto",
) -> None:
    """Update parameters and momenta in place.

    Args:
        parameters: matrices [rows, columns] and stacks of them [n, rows, columns].
        gradients, momenta: one of the same shape for each parameter.
        lr: of an update as large as AdamW's.
        weight_decay: decoupled, multiplied by ``lr``.
        beta: of the momentum.
        dtype: of the products in ``orthogonalize``.
        backend: a name from ``deltamoe backends``, or "auto".
    """
    if parameters:
        module = select("muon", backend, parameters[0].device.type, dtype)
        module.muon_step_(parameters, gradients, momenta, lr, weight_decay, beta, dtype)
