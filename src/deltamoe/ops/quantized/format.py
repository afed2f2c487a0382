"""What a quantised weight is, how one is made, and what it stands for."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "BITS",
    "GROUP",
    "TILE",
    "QuantizedWeight",
    "dequantize",
    "quantize",
    "quantize_activations",
]

BITS = (8, 4)
TILE = 16
"""Outputs that are computed together."""
GROUP = 32
"""Inputs that share one scale."""

_MIDDLE = {8: 128, 4: 8}
# With four bits a scale below the one that reaches the largest weight often fits the rest better.
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
_LARGEST_SCALE = 65504.0
_WEIGHTS_AT_ONCE = 1 << 18  # rounding takes some thirty bytes for each


class QuantizedWeight(NamedTuple):
    """A matrix [*lead, out_features, in_features], packed; the layout is the package's docstring.

    Attributes:
        values: uint8 [*lead, tiles, groups, bytes], the codes.
        scales: fp16 [*lead, tiles, groups, 16].
        bits: 8 or 4.
        out_features, in_features: the matrix's own size, without what fills up tiles and groups.
    """

    values: Tensor
    scales: Tensor
    bits: int
    out_features: int
    in_features: int

    @property
    def shape(self) -> torch.Size:
        """Of the matrix it stands for."""
        return torch.Size((*self.values.shape[:-3], self.out_features, self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.values.nbytes + self.scales.nbytes

    def select(self, index: int) -> "QuantizedWeight":
        """One entry of the first leading axis, such as one expert; nothing is copied."""
        return self._replace(values=self.values[index], scales=self.scales[index])


@torch.no_grad()
def quantize(weight: Float[Tensor, "*lead out in"], bits: int) -> QuantizedWeight:
    """Round a weight to 8 or 4 bits.

    Args:
        weight: any floating dtype; not changed.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, or a weight that is not finite or too large for an fp16 scale.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: expected one of {BITS}")
    *lead, out_features, in_features = weight.shape
    matrices = weight.reshape(-1, out_features, in_features)
    if not len(matrices):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has nothing to quantise")
    packed = [_quantize_matrix(matrix, bits) for matrix in matrices]
    values, scales = (torch.stack(parts) for parts in zip(*packed, strict=True))
    return QuantizedWeight(
        values.view(*lead, *values.shape[1:]),
        scales.view(*lead, *scales.shape[1:]),
        bits,
        out_features,
        in_features,
    )


def _quantize_matrix(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> values [tiles, groups, bytes], scales [tiles, groups, 16], block by block."""
    rows = max(_WEIGHTS_AT_ONCE // (weight.shape[1] * TILE), 1) * TILE
    blocks = [_quantize_rows(block, bits) for block in weight.split(rows)]
    values, scales = zip(*blocks, strict=True)
    return torch.cat(values), torch.cat(scales)


def _quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> values [tiles, groups, bytes], scales [tiles, groups, 16]."""
    out_features, in_features = weight.shape
    padding = (0, -in_features % GROUP, 0, -out_features % TILE)
    groups = F.pad(weight.float(), padding).unflatten(1, (-1, GROUP))  # [out, groups, 32]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    middle = _MIDDLE[bits]
    # Of 4 bits' -8 to 7 the largest weight takes -8, so a scale has its sign turned round.
    full = largest.abs() / 127 if bits == 8 else -largest / 8
    if not bool((full.abs() <= _LARGEST_SCALE).all()):
        raise ValueError(
            f"a weight of {tuple(weight.shape)} has entries that are not finite, or beyond the "
            f"range of an fp16 scale at {bits} bits"
        )
    best_scale, best_codes, best_error = full, torch.empty(0), torch.empty(0)
    for shrink in _SHRINK[bits]:
        scale = (full * shrink).half().float()
        codes = (groups / torch.where(scale == 0, 1.0, scale)).round_()
        codes.clamp_(-127 if bits == 8 else -8, middle - 1)
        error = (codes * scale - groups).square_().sum(dim=2, keepdim=True)
        if best_error.numel():
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better, codes, best_codes)
            best_error = torch.where(better, error, best_error)
        else:
            best_scale, best_codes, best_error = scale, codes, error
    codes = (best_codes + middle).to(torch.uint8)
    scales = best_scale.squeeze(2).half().unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()
    return _pack(codes.unflatten(0, (-1, TILE)), bits), scales


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[tiles, 16, groups, 32] -> [tiles, groups, bytes]."""
    if bits == 8:
        steps = codes.unflatten(3, (8, 4))
    else:
        halves = codes.unflatten(3, (4, 2, 4))
        steps = halves[..., 0, :] | halves[..., 1, :] << 4
    packed: Tensor = steps.permute(0, 2, 3, 1, 4).flatten(2).contiguous()
    return packed


def _unpack(values: Tensor, bits: int) -> Tensor:
    """[..., tiles, groups, bytes] -> [..., tiles, 16, groups, 32] codes."""
    steps = values.unflatten(-1, (-1, TILE, 4)).movedim(-2, -4)  # [..., tiles, 16, groups, step, 4]
    if bits == 4:
        steps = torch.stack([steps & 15, steps >> 4], dim=-2).flatten(-2)
    codes: Tensor = steps.flatten(-2)
    return codes


def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*lead out in"]:
    """The matrix that the codes stand for."""
    codes = _unpack(weight.values, weight.bits).float() - _MIDDLE[weight.bits]
    matrix = codes * weight.scales.float().transpose(-1, -2)[..., None]
    matrix = matrix.flatten(-2).flatten(-3, -2)  # [*lead, tiles * 16, groups * 32]
    return matrix[..., : weight.out_features, : weight.in_features].to(dtype)


def quantize_activations(
    x: Float[Tensor, "*batch in"],
) -> tuple[Int[Tensor, "*batch groups 32"], Float[Tensor, "*batch groups 1"]]:
    """Round what multiplies a quantised weight: -127 to 127 with an fp32 scale a group.

    The definition of what the CPU's products of few rows compute with.
    """
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, 127 / largest)
    return (groups * inverse).round().to(torch.int8), largest / 127
