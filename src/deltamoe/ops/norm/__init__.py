"""Norms: each computes in fp32 (fp64 for fp64 inputs).

Lives here: the operators and, in ``reference.py``, their definitions; the CPU's kernel is
``native.py`` over ``ops/native/norm.cpp``.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
"""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.norm import reference
from deltamoe.ops.norm.reference import l2_normalize

__all__ = ["gated_rms_norm", "l2_normalize", "rms_norm"]


def rms_norm(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch D"]:
    """Scale each vector to root-mean-square 1, then by ``weight``; eps joins the mean square.

    Args:
        x: vectors.
        weight: one factor a channel.
        eps: > 0.
        dtype: of the result; None for x's.
    """
    result: Tensor = _backend(x).rms_norm(x, weight, eps, dtype=dtype)
    return result


def gated_rms_norm(
    x: Float[Tensor, "*batch D"],
    logits: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    activation: str,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch D"]:
    """``rms_norm(x) * activation(logits)``, rounded once.

    Args:
        x, weight, eps, dtype: as in ``rms_norm``.
        logits: how far each channel opens.
        activation: "sigmoid" or "swish".
    """
    result: Tensor = _backend(x).gated_rms_norm(
        x, logits, weight, eps, activation=activation, dtype=dtype
    )
    return result


def _backend(x: Tensor) -> ModuleType:
    if torch.compiler.is_compiling():  # it traces PyTorch's operations, and fuses them itself
        return reference
    return select("norm", "auto", x.device.type, x.dtype)
