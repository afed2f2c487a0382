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

__all__ = ["add_rms_norm", "gated_rms_norm", "l2_normalize", "rms_norm"]


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


def add_rms_norm(
    x: Float[Tensor, "*batch D"],
    branch: Float[Tensor, "*batch D"] | None,
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """Add a branch to the residual stream and normalise the sum.

    One pass over memory where an addition and a norm need three, and one backward that also adds
    the stream's own gradient, as flash-linear-attention's norms do with ``residual`` and
    ``prenorm=True``.

    Args:
        x: the stream.
        branch: what is added; None for nothing.
        weight, eps: as in ``rms_norm``.
        dtype: of the norm; None for the sum's.

    Returns:
        The sum, in the wider dtype of x and branch (without a branch x itself), and its
        ``rms_norm``.
    """
    result: tuple[Tensor, Tensor] = _backend(x).add_rms_norm(x, branch, weight, eps, dtype=dtype)
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
