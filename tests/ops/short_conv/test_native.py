"""The C++ convolution is the definition's, forward and backward, whatever the layout."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from deltamoe.ops import native as libraries
from deltamoe.ops.short_conv import native, reference

pytestmark = pytest.mark.skipif(
    libraries.why_not("conv") is not None, reason=str(libraries.why_not("conv"))
)

HEADS, HEAD_DIM = 3, 21  # 63 channels: no multiple of any vector
CHANNELS = HEADS * HEAD_DIM

# fp32 against fp64: a handful of roundings, or a sum over the tokens of one.
FP32 = {"rtol": 1e-5, "atol": 1e-5}
# Inputs are the same bf16 numbers and sums are fp32: one rounding at the end, 2^-8 of the result.
BF16 = {"rtol": 2**-8, "atol": 1e-5}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(module, x, weight, past, is_normalized: bool, **rows):
    if is_normalized:
        y, last = module.normalized_short_conv(
            x, weight, past, head_dim=HEAD_DIM, scale=0.3, **rows
        )
        return y.flatten(-2), last
    return module.short_conv(x, weight, past, **rows)


def check(
    x, weight, past, *, is_normalized: bool, tolerance: dict[str, float], **rows
) -> list[torch.Tensor]:
    """Compare with the definition in fp64; return what the C++ made."""
    inputs = [t for t in (x, weight, past) if t is not None]
    inputs = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    padded = (None,) if past is None else ()
    y, last = run(native, *inputs, *padded, is_normalized, **rows)
    y_exact, last_exact = run(reference, *exact, *padded, is_normalized, **rows)
    assert y.dtype == (torch.float32 if is_normalized else x.dtype)
    assert torch.equal(last.double(), last_exact)
    torch.testing.assert_close(y.double(), y_exact, **tolerance)
    d_y = torch.randn_like(y)
    d_last = torch.randn_like(last)
    got = torch.autograd.grad((y, last), inputs, (d_y, d_last))
    expected = torch.autograd.grad((y_exact, last_exact), exact, (d_y.double(), d_last.double()))
    for name, g, e in zip(("x", "weight", "past"), got, expected, strict=False):
        bound = tolerance
        if name == "weight":  # a sum over all tokens, in fp32
            bound = {"rtol": 1e-4, "atol": 1e-4}
        elif x.dtype == torch.bfloat16:
            # What comes through y and what comes through the state, each about 1, are rounded and
            # then added; they may cancel.
            bound = {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(g.double(), e, **bound, msg=lambda m, n=name: f"d_{n}: {m}")
    return [y, last, *got]


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 15])  # 15: longer than the sequence of 11
@pytest.mark.parametrize("time", [1, 11, 530])  # 530: two chunks, nine tiles
def test_rows(is_normalized: bool, width: int, time: int) -> None:
    x = torch.randn(2, time, CHANNELS)
    weight, past = torch.randn(CHANNELS, width), torch.randn(2, width - 1, CHANNELS)
    check(x, weight, past, is_normalized=is_normalized, tolerance=FP32)
    check(x, weight, None, is_normalized=is_normalized, tolerance=FP32)
    lengths = torch.tensor([time, time // 2])
    check(x, weight, past, is_normalized=is_normalized, tolerance=FP32, lengths=lengths)


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("lengths", [(11,), (1, 2, 8), (0, 4, 0, 7), (700, 0, 65)])
def test_packed(is_normalized: bool, lengths: tuple[int, ...]) -> None:
    x = torch.randn(1, sum(lengths), CHANNELS)
    weight, past = torch.randn(CHANNELS, 4), torch.randn(len(lengths), 3, CHANNELS)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    options = {"is_normalized": is_normalized, "tolerance": FP32, "cu_seqlens": borders}
    check(x, weight, past, **options)
    check(x, weight, None, **options)


@pytest.mark.parametrize("is_normalized", [False, True])
def test_bf16(is_normalized: bool) -> None:
    x, past = torch.randn(2, 75, CHANNELS).bfloat16(), torch.randn(2, 3, CHANNELS).bfloat16()
    check(x, torch.randn(CHANNELS, 4), past, is_normalized=is_normalized, tolerance=BF16)


def test_no_tokens() -> None:
    weight, past = torch.randn(CHANNELS, 4), torch.randn(2, 3, CHANNELS)
    x = torch.randn(2, 0, CHANNELS, requires_grad=True)
    y, last = native.short_conv(x, weight, past)
    assert y.shape == x.shape
    assert torch.equal(last, past)
    y.sum().backward()
    assert x.grad is not None


def test_rows_that_stand_apart() -> None:
    whole = torch.randn(2, 19, CHANNELS + 8)
    strided = whole[..., 3 : 3 + CHANNELS]
    weight, past = torch.randn(CHANNELS, 4), torch.randn(2, CHANNELS, 3).transpose(1, 2)
    apart = check(strided, weight, past, is_normalized=True, tolerance=FP32)
    together = check(
        strided.contiguous(), weight, past.contiguous(), is_normalized=True, tolerance=FP32
    )
    assert torch.equal(apart[0], together[0])


def test_large_and_broken_numbers() -> None:
    x = torch.tensor([-1e30, -100.0, -90.0, 0.0, 90.0, 1e30, torch.inf, torch.nan])
    y, _ = native.short_conv(x.view(1, -1, 1), torch.ones(1, 1))
    expected = torch.nn.functional.silu(x)
    # silu(-100) is -4e-42 and may be called 0: no subnormal results are promised.
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-6, atol=1e-37, equal_nan=True)


def test_the_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(1, 1100, CHANNELS), torch.randn(CHANNELS, 4)
    results = []
    for number in (1, 2):
        with threads(number):
            torch.manual_seed(0)
            results.append(check(x, weight, None, is_normalized=True, tolerance=FP32))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
