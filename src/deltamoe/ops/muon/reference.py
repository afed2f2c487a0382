"""Muon in PyTorch, the definition: any device, any dtype, matrices of one shape in one batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COEFFICIENTS", "NUM_ITERATIONS", "muon_step_", "orthogonalize", "update_scale"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5

# Newton-Schulz runs on slices of a batch of this many elements: near a core's cache, and a bound on
# the extra memory. A single larger matrix is a slice of its own.
SLICE_ELEMENTS = 2**21


def orthogonalize(matrices: Tensor, *, num_iterations: int = NUM_ITERATIONS) -> Tensor:
    """Push every singular value of each matrix toward 1 by Newton-Schulz.

    Args:
        matrices: [n, rows, columns] with rows <= columns, so that the Gram matrices are the small
            ones. Its dtype is the dtype of the computation.
        num_iterations: 5 brings singular values above 1e-3 of the norm into about 0.7 to 1.2.

    Returns:
        a new tensor of the same shape and dtype.

    Cost: ``num_iterations * (4 rows^2 columns + 2 rows^3)`` FLOPs a matrix.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    x: Tensor = matrices / norms.clamp(min=1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


def update_scale(shape: torch.Size) -> float:
    """What brings an orthogonal matrix to the size of an AdamW update."""
    return 0.2 * math.sqrt(max(shape[-2:]))


def muon_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    beta: float,
    dtype: torch.dtype,
) -> None:
    """Update parameters and momenta in place; see ``deltamoe.ops.muon``."""
    # Wide matrices of one shape share a batch: all layers, all experts, w_down beside w_up.
    batches: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
        momentum.lerp_(gradient, 1 - beta)
        update, target = _as_wide(gradient.lerp(momentum, beta)), _as_wide(parameter)
        batches.setdefault(update.shape[-2:], []).append((target, update))
        parameter.mul_(1 - lr * weight_decay)
    for shape, batch in batches.items():
        stacked = torch.cat([update.to(dtype) for _, update in batch])
        slices = torch.split(stacked, max(1, SLICE_ELEMENTS // shape.numel()))
        orthogonal = torch.cat([orthogonalize(piece) for piece in slices])
        pieces = torch.split(orthogonal, [len(target) for target, _ in batch])
        for (target, _), piece in zip(batch, pieces, strict=True):
            target.add_(piece, alpha=-lr * update_scale(shape))


def _as_wide(matrices: Tensor) -> Tensor:
    """View [..., rows, columns] as [n, rows', columns'] with rows' <= columns'."""
    rows, columns = matrices.shape[-2:]
    stack = matrices.view(-1, rows, columns)
    return stack if rows <= columns else stack.mT
