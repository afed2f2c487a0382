"""The short convolution: against its formula, in pieces, packed, ragged."""

import pytest
import torch
import torch.nn.functional as F

from deltamoe.ops.short_conv import short_conv

B, T, CHANNELS, W = 2, 11, 5, 4


def by_formula(x: torch.Tensor, weight: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    width = weight.shape[1]
    padded = torch.cat([past, x], dim=1)
    rows = []
    for t in range(x.shape[1]):
        rows.append(sum(weight[:, j] * padded[:, t + j] for j in range(width)))
    return F.silu(torch.stack(rows, dim=1))


def inputs(width: int = W) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return normal(B, T, CHANNELS), normal(CHANNELS, width), normal(B, width - 1, CHANNELS)


@pytest.mark.parametrize("width", [1, 2, 4, 15])  # 15: longer than the sequence
def test_formula_and_gradients(width: int) -> None:
    x, weight, past = inputs(width)
    y, state = short_conv(x, weight, past)
    torch.testing.assert_close(y, by_formula(x, weight, past), rtol=0, atol=1e-12)
    assert torch.equal(state, torch.cat([past, x], dim=1)[:, T:])
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a)[0], (x, weight, past))


def test_zeros_stand_before_the_start() -> None:
    x, weight, past = inputs()
    assert torch.equal(short_conv(x, weight)[0], short_conv(x, weight, past.detach() * 0)[0])


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_in_pieces(cut: int) -> None:
    x, weight, past = inputs()
    whole, final = short_conv(x, weight, past)
    head, between = short_conv(x[:, :cut], weight, past)
    tail, end = short_conv(x[:, cut:], weight, between)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-12)
    assert torch.equal(end, final)


def test_padding_does_not_enter_the_state() -> None:
    x, weight, past = inputs()
    lengths = torch.tensor([7, 1])
    y, state = short_conv(x, weight, past, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, expected = short_conv(x[row : row + 1, :length], weight, past[row : row + 1])
        torch.testing.assert_close(y[row, :length], alone[0], rtol=0, atol=1e-12)
        assert torch.equal(state[row], expected[0])


@pytest.mark.parametrize("lengths", [(11,), (1, 2, 8), (0, 4, 0, 7)])
def test_packed_sequences_do_not_meet(lengths: tuple[int, ...]) -> None:
    x, weight, _ = inputs()
    x = x[:1]
    past = torch.randn(len(lengths), W - 1, CHANNELS, dtype=torch.float64, requires_grad=True)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    y, state = short_conv(x, weight, past, cu_seqlens=borders)
    for n in range(len(lengths)):
        span = slice(int(borders[n]), int(borders[n + 1]))
        alone, expected = short_conv(x[:, span], weight, past[n : n + 1])
        torch.testing.assert_close(y[:, span], alone, rtol=0, atol=1e-12)
        assert torch.equal(state[n], expected[0])
    assert torch.autograd.gradcheck(
        lambda a, b, c: short_conv(a, b, c, cu_seqlens=borders)[0],
        (x.detach().requires_grad_(), weight, past),
    )


def test_half_precision_keeps_its_dtype() -> None:
    x, weight, past = (z.detach() for z in inputs())
    y, state = short_conv(x.bfloat16(), weight.float(), past.bfloat16())
    assert y.dtype == state.dtype == torch.bfloat16
    exact = by_formula(x.bfloat16().double(), weight.float().double(), past.bfloat16().double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-2)  # one rounding to bf16
