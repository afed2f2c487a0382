"""Quantised weights: what rounding costs, that packing loses nothing, and their products."""

import pytest
import torch
from torch import Tensor

from deltamoe.ops import native
from deltamoe.ops.quantized import (
    BITS,
    GROUP,
    TILE,
    QuantizedWeight,
    dequantize,
    linear,
    quantize,
    quantize_activations,
    unpack,
)
from deltamoe.ops.quantized.native import multiply

SHAPES = [(37, 70), (16, 32), (5, 24), (1, 1), (130, 517), (64, 512), (37, 128)]

needs_compiler = pytest.mark.skipif(
    native.why_not("matvec") is not None, reason=f"native: {native.why_not('matvec')}"
)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_moves_further_than_half_a_step(bits: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    back = dequantize(quantize(weight, bits))
    assert back.shape == weight.shape
    groups = torch.nn.functional.pad(weight, (0, -shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(dim=2).repeat_interleave(GROUP, dim=1)[:, : shape[1]]
    # Half a step of the scale that reaches the largest weight; with 4 bits a smaller scale may
    # cut the largest by a quarter. fp16 scales are exact to 2^-11.
    step = largest / 127 / 2 if bits == 8 else largest / 4
    assert bool(((back - weight).abs() <= step * 1.01 + 1e-7).all())


def test_the_error_of_normal_weights() -> None:
    weight = torch.randn(256, 512)
    error = [float((dequantize(quantize(weight, b)) - weight).norm() / weight.norm()) for b in BITS]
    # A group of 32 normal numbers reaches 2.1 on average: a uniform error of 2.1 / 127 / sqrt(12)
    # with 8 bits; with 4 bits, 2.1 / 8 / sqrt(12) = 0.076 before the better scale is chosen.
    assert error[0] == pytest.approx(0.0050, abs=0.0005)
    assert error[1] < 0.083


@pytest.mark.parametrize("bits", BITS)
def test_what_was_rounded_is_kept_exactly(bits: int) -> None:
    weight = dequantize(quantize(torch.randn(3, 37, 70), bits))
    again = quantize(weight, bits)
    # An fp16 scale times a code is exact in fp32, and is its own best approximation.
    torch.testing.assert_close(dequantize(again), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_leading_axes_are_matrices_of_their_own(bits: int) -> None:
    weight = torch.randn(2, 3, 20, 40)
    stack = quantize(weight, bits)
    assert stack.shape == weight.shape
    one = quantize(weight[1, 2], bits)
    assert torch.equal(stack.select(1).select(2).values, one.values)
    assert torch.equal(stack.select(1).select(2).scales, one.scales)
    assert stack.nbytes == 6 * one.nbytes
    assert one.nbytes == 2 * 2 * TILE * (GROUP * bits // 8 + 2)


def test_zeros_and_damage() -> None:
    for bits in BITS:
        assert not bool(dequantize(quantize(torch.zeros(3, 40), bits)).any())
        for bad in (torch.nan, torch.inf, 1e8):
            weight = torch.ones(3, 40)
            weight[1, 5] = bad
            with pytest.raises(ValueError, match="not finite"):
                quantize(weight, bits)
    with pytest.raises(ValueError, match="bits = 3"):
        quantize(torch.ones(2, 2), 3)


@pytest.mark.parametrize("bits", BITS)
def test_for_many_rows_and_in_fp64_the_weight_is_unpacked(bits: int) -> None:
    weight, x = quantize(torch.randn(37, 70), bits), torch.randn(3, 17, 70)
    torch.testing.assert_close(linear(x, weight), x @ dequantize(weight).T)
    few = x[0, :2].double()
    torch.testing.assert_close(linear(few, weight), few @ dequantize(weight, torch.float64).T)


@pytest.mark.parametrize("bits", BITS)
def test_without_a_compiler_the_weight_is_unpacked(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda name: "no C++ compiler was found")
    weight, x = quantize(torch.randn(37, 70), bits), torch.randn(3, 70)
    torch.testing.assert_close(linear(x, weight), x @ dequantize(weight).T)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_unpacking_is_the_definition(
    bits: int, shape: tuple[int, int], lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = quantize(torch.randn(*lead, *shape), bits)
    assert torch.equal(unpack(weight, dtype), dequantize(weight, dtype))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 70])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", 8, 4])
def test_the_products(kind: str | int, shape: tuple[int, int], rows: int) -> None:
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    packed: Tensor | QuantizedWeight
    if isinstance(kind, int):
        packed = quantize(weight, kind)
        codes, scales = quantize_activations(x)
        rounded = (codes * scales.double()).flatten(-2)[:, : shape[1]]
        wanted = rounded @ dequantize(packed).double().T
    else:
        packed = weight if kind == "fp32" else weight.bfloat16()
        wanted = x.double() @ packed.double().T
    y = multiply(x, packed)
    # fp32 sums of at most 517 products of normal numbers, of size sqrt(517) or so
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    for row in (0, rows - 1):
        alone = multiply(x[row : row + 1], packed)
        assert torch.equal(y[row : row + 1], alone), "a row depends on its neighbours"


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_rounded_to_eight_bits_and_no_further(bits: int) -> None:
    weight, x = quantize(torch.randn(64, 512), bits), torch.randn(2, 1, 512)
    exact = x @ dequantize(weight).T
    y = linear(x, weight)
    assert y.shape == exact.shape
    assert float((y - exact).norm() / exact.norm()) < 0.01  # see test_the_error_of_normal_weights
    assert linear(x.bfloat16(), weight).dtype == torch.bfloat16


@needs_compiler
def test_damage_in_a_row_is_not_rounded_away() -> None:
    weight = quantize(torch.randn(20, 70), 8)
    for bad in (torch.nan, torch.inf):
        x = torch.randn(2, 70)
        x[1, 33] = bad
        y = linear(x, weight)
        assert bool(y[0].isfinite().all())
        assert bool(y[1].isnan().all())
