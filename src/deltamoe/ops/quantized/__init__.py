"""Weights of 8 and 4 bits, and the product with them.

Symmetric quantisation in groups of 32 along the input: ``weight = scale * (code - middle)`` with
one fp16 scale a group, and codes of 0 to 255 around 128, or 0 to 15 around 8. Shapes, with ``lead``
standing for any number of leading axes such as the experts' E:

    values  uint8 [*lead, tiles, groups, 512 (8 bits) or 256 (4 bits)]
    scales  fp16  [*lead, tiles, groups, 16]

A tile is 16 neighbouring outputs, a group 32 neighbouring inputs; outputs and inputs are filled up
with zeros to whole tiles and groups (a zero's code is the middle). Inside a tile and group the
codes stand so that one load serves all 16 outputs:

    8 bits  byte [step, row, i]      input 4 step + i of output row,  step < 8, row < 16, i < 4
    4 bits  byte [step, row, i]      low half input 8 step + i, high half input 8 step + 4 + i,
                                     step < 4

A matrix, an expert and a tile each lie in one piece, so they can be memory-mapped, cut out along
the leading axes, and read from end to end.

Lives here: the format (``quantize``, ``dequantize``) and ``linear``; on the CPU products of a few
rows, and unpacking for those of many, are ``native.py`` over ``ops/native/matvec.cpp``.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
"""

from deltamoe.ops.quantized.format import (
    BITS,
    GROUP,
    TILE,
    QuantizedWeight,
    dequantize,
    quantize,
    quantize_activations,
)
from deltamoe.ops.quantized.product import has_few_rows, linear, unpack

__all__ = [
    "BITS",
    "GROUP",
    "TILE",
    "QuantizedWeight",
    "dequantize",
    "has_few_rows",
    "linear",
    "quantize",
    "quantize_activations",
    "unpack",
]
