"""The two decay activations, against their formulas in fp64 and at their edges."""

import pytest
import torch

from deltamoe.ops.kda import kda_decay

HV, K = 3, 5


def parameters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 4 * torch.randn(2, 7, HV, K, dtype=torch.float64)
    A_log = torch.rand(HV, dtype=torch.float64) * 3
    dt_bias = torch.randn(HV * K, dtype=torch.float64)
    return logits, A_log, dt_bias


def test_softplus_form() -> None:
    logits, A_log, dt_bias = parameters()
    got = kda_decay(logits, A_log, dt_bias)
    expected = -A_log.exp()[:, None] * torch.log1p((logits + dt_bias.view(HV, K)).exp())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lower_bound", [-5.0, -0.5])
def test_bounded_form(lower_bound: float) -> None:
    logits, A_log, dt_bias = parameters()
    got = kda_decay(logits * 100, A_log, dt_bias, lower_bound=lower_bound)
    assert (got >= lower_bound).all()
    assert (got <= 0).all()
    shifted = A_log.exp()[:, None] * (logits + dt_bias.view(HV, K))
    expected = lower_bound / (1 + (-shifted).exp())
    got = kda_decay(logits, A_log, dt_bias, lower_bound=lower_bound)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-300)


def test_half_precision_logits_are_widened_first() -> None:
    logits, A_log, dt_bias = parameters()
    half = logits.bfloat16()
    got = kda_decay(half, A_log.float(), dt_bias.float())
    assert got.dtype == torch.float32
    exact = kda_decay(half.double(), A_log, dt_bias)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)  # fp32 rounding


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradients(lower_bound: float | None) -> None:
    inputs = tuple(x.requires_grad_() for x in parameters())
    assert torch.autograd.gradcheck(lambda *a: kda_decay(*a, lower_bound=lower_bound), inputs)
