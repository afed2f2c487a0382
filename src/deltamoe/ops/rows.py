"""Moving rows to other places, forward and backward by the same copy.

Autograd's backward of ``x[index]`` adds row by row into zeros, because an index may repeat. Where
every row goes to at most one place, the gradient is a plain copy the other way.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["inverse_of", "move_rows"]


def move_rows(
    x: Float[Tensor, "rows *channels"],
    source: Int[Tensor, "places"],
    target: Int[Tensor, "rows"],
) -> Float[Tensor, "places *channels"]:
    """Return ``out[p] = x[source[p]]``, and zeros where ``source[p]`` is ``len(x)``.

    Args:
        x: rows.
        source: which row stands at each place; ``len(x)`` for none. No row stands at two places.
        target: where each row went; ``len(source)`` for nowhere (``inverse_of`` makes it).
    """
    result: Tensor = _MoveRows.apply(x, source, target)  # type: ignore[no-untyped-call]
    return result


def inverse_of(source: Int[Tensor, "places"], num_rows: int) -> Int[Tensor, "rows"]:
    """Where each of ``num_rows`` rows went, ``len(source)`` for nowhere."""
    target = source.new_full((num_rows + 1,), len(source))
    target[source] = torch.arange(len(source), device=source.device)
    return target[:-1]


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        return _copy(x, source)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        source, target = ctx.saved_tensors
        return move_rows(d_out, target, source), None, None


def _copy(x: Tensor, source: Tensor) -> Tensor:
    present = source < len(x)
    if bool(present.all()):
        return x.index_select(0, source)
    out = x.new_zeros(len(source), *x.shape[1:])
    places = present.nonzero().squeeze(1)
    return out.index_copy_(0, places, x.index_select(0, source[places]))
