"""Layers whose matrices are kept in 8 or 4 bits: they answer, and cannot be trained.

Each stands in the place of the layer it is named after and is called the same way. What is kept are
the codes and scales of ``deltamoe.ops.quantized``, as buffers, so that a file's bytes can become
them without a copy. Knows nothing of files.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltamoe.errors import ConfigError
from deltamoe.layers.mlp import Mlp
from deltamoe.layers.moe import Experts
from deltamoe.layers.router import Routing
from deltamoe.ops.experts import combine, dispatch, feed_forward
from deltamoe.ops.quantized import (
    GROUP,
    TILE,
    QuantizedWeight,
    has_few_rows,
    linear,
    quantize,
    unpack,
)

__all__ = ["QuantizedExperts", "QuantizedLinear", "QuantizedMatrix", "QuantizedMlp", "mix"]


_Module = TypeVar("_Module", bound=nn.Module)


class QuantizedMatrix(nn.Module):
    """The codes and scales of one matrix, or of a stack of them."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.bits = weight.bits
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)

    @property
    def quantized(self) -> QuantizedWeight:
        """What the operators take."""
        sizes = self.out_features, self.in_features
        return QuantizedWeight(self.values, self.scales, self.bits, *sizes)

    def train(self: _Module, mode: bool = True) -> _Module:
        """Refuse to train.

        Raises:
            ConfigError: if ``mode`` is true.
        """
        if mode:
            raise ConfigError(
                "a quantised model answers and cannot be trained; train the model it was made "
                "from, and quantise that again"
            )
        return nn.Module.train(self, mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedMatrix":
        """Go to another device; a change of dtype is for the other layers."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.values.device)
        return self


class QuantizedLinear(QuantizedMatrix):
    """``nn.Linear`` without a bias."""

    @classmethod
    def of(cls, layer: nn.Linear, bits: int) -> "QuantizedLinear":
        """Round a linear layer's matrix."""
        return cls(_rounded(layer.weight, bits))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch out"]:
        """Multiply; the result has x's dtype."""
        return linear(x, self.quantized)


class QuantizedMlp(nn.Module):
    """``Mlp``."""

    def __init__(
        self, w_gate: QuantizedLinear | None, w_up: QuantizedLinear, w_down: QuantizedLinear
    ) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = w_gate, w_up, w_down

    @classmethod
    def of(cls, layer: Mlp, bits: int) -> "QuantizedMlp":
        """Round an MLP's matrices."""
        gate = None if layer.w_gate is None else QuantizedLinear.of(layer.w_gate, bits)
        return cls(
            gate, QuantizedLinear.of(layer.w_up, bits), QuantizedLinear.of(layer.w_down, bits)
        )

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Work on each token alone."""
        up: Tensor = self.w_up(x)
        hidden = F.gelu(up) if self.w_gate is None else F.silu(self.w_gate(x)) * up
        y: Tensor = self.w_down(hidden)
        return y


class QuantizedExperts(nn.Module):
    """``Experts``; only those that were chosen are read.

    The three are stacks along E; without ``w_gate`` an expert is a plain FFN with a GELU.
    """

    def __init__(
        self, w_gate: QuantizedMatrix | None, w_up: QuantizedMatrix, w_down: QuantizedMatrix
    ) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = w_gate, w_up, w_down

    @classmethod
    def of(cls, layer: Experts, bits: int) -> "QuantizedExperts":
        """Round the experts' matrices."""
        gate = None if layer.w_gate is None else QuantizedMatrix(_rounded(layer.w_gate, bits))
        up, down = (QuantizedMatrix(_rounded(w, bits)) for w in (layer.w_up, layer.w_down))
        return cls(gate, up, down)

    def forward(
        self, x: Float[Tensor, "N D"], routing: Routing, capacity: int | None = None
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, "E"]]:
        """Answer tokens by the experts they chose; also the rows of each expert."""
        assert capacity is None, "only training drops tokens"
        chosen = routing.counts.nonzero().flatten().tolist()
        return mix(x, routing, self.answer, zip(chosen, chosen, strict=True))

    def answer(self, index: int, x: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Answer rows by the expert at one place of the stacks."""
        if not has_few_rows(x):
            gate = None
            if self.w_gate is not None:
                gate = unpack(self.w_gate.quantized.select(index), x.dtype)
            up = unpack(self.w_up.quantized.select(index), x.dtype)
            return feed_forward(x, gate, up, unpack(self.w_down.quantized.select(index), x.dtype))
        up = linear(x, self.w_up.quantized.select(index))
        if self.w_gate is None:
            hidden = F.gelu(up)
        else:
            hidden = F.silu(linear(x, self.w_gate.quantized.select(index))) * up
        return linear(hidden, self.w_down.quantized.select(index))


def mix(
    x: Float[Tensor, "N D"],
    routing: Routing,
    answer: Callable[[int, Tensor], Tensor],
    places: Iterable[tuple[int, int]],
) -> tuple[Float[Tensor, "N D"], Int[Tensor, "E"]]:
    """Send tokens to their experts, expert by expert in any order, and sum the answers.

    Args:
        x: tokens.
        routing: the router's choice.
        answer: gives the answers to some rows of the expert at a place.
        places: each chosen expert once, with its place.

    Returns:
        The weighted answers, and the rows of each expert. Neither depends on the order of
        ``places`` nor on the places.
    """
    routed = dispatch(x, routing.expert_ids, len(routing.counts))
    ends = routed.counts.cumsum(0).tolist()
    answers = torch.empty_like(routed.tokens)
    for expert, place in places:
        rows = slice(ends[expert - 1] if expert else 0, ends[expert])
        answers[rows] = answer(place, routed.tokens[rows])
    return combine(answers, routed, routing.expert_weights).to(x.dtype), routed.counts


def _rounded(weight: Tensor, bits: int) -> QuantizedWeight:
    """The weight in so many bits; of one without memory, room for it."""
    if not weight.is_meta:
        return quantize(weight, bits)
    *lead, rows, columns = weight.shape
    groups = *lead, -(-rows // TILE), -(-columns // GROUP)
    return QuantizedWeight(
        torch.empty(*groups, TILE * GROUP * bits // 8, dtype=torch.uint8, device="meta"),
        torch.empty(*groups, TILE, dtype=torch.float16, device="meta"),
        bits,
        rows,
        columns,
    )
