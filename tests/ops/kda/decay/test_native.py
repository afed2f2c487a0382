"""The C++ decay is the definition's, forward and backward."""

import pytest
import torch

from deltamoe.ops import native as libraries
from deltamoe.ops.kda.decay import native, reference

_reason = libraries.why_not("decay")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"native: {_reason}")

HV, K = 3, 7
BOUNDS = [None, -3.0]


def check(logits, A_log, dt_bias, lower_bound: float | None):
    """Compare with the definition in fp64; return what the C++ made."""
    inputs = [t.detach().requires_grad_() for t in (logits, A_log, dt_bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = native.kda_decay(*inputs, lower_bound=lower_bound)
    expected = reference.kda_decay(*exact, lower_bound=lower_bound)
    assert y.dtype == torch.float32
    # A few fp32 roundings, relative also where the decay is nearly nothing.
    torch.testing.assert_close(y.double(), expected, rtol=3e-6, atol=1e-37)
    d_y = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, d_y)
    wanted = torch.autograd.grad(expected, exact, d_y.double())
    for g, w, tensor in zip(got, wanted, inputs, strict=True):
        assert g.dtype == tensor.dtype
        # bf16 rounds the gradient of the logits once; the others are fp32 sums over all tokens.
        rtol = 2**-8 if g.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=1e-4)
    return [y, *got]


@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 300)])  # 300: three blocks
def test_decay(lower_bound: float | None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = (6 * torch.randn(*shape, HV, K)).to(dtype)
    check(logits, torch.rand(HV), torch.randn(HV * K), lower_bound)


def test_strided_and_empty() -> None:
    A_log, dt_bias = torch.rand(HV), torch.randn(HV * K)
    check(torch.randn(2, HV, 5, K).transpose(1, 2), A_log, dt_bias, None)
    check(torch.randn(2, 0, HV, K), A_log, dt_bias, None)


@pytest.mark.parametrize("lower_bound", BOUNDS)
def test_far_away(lower_bound: float | None) -> None:
    """No overflow at either end, full relative precision for tiny decays, NaN stays NaN."""
    logits = torch.tensor([-1e4, -80.0, -30.0, -1e-3, 0.0, 19.0, 25.0, 1e4, torch.nan])
    logits = logits.view(1, -1, 1, 1)
    A_log, dt_bias = torch.tensor([0.3]), torch.zeros(1)
    got = native.kda_decay(logits, A_log, dt_bias, lower_bound=lower_bound)
    expected = reference.kda_decay(
        logits.double(), A_log.double(), dt_bias.double(), lower_bound=lower_bound
    )
    torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=1e-37, equal_nan=True)


def test_the_number_of_threads_changes_nothing() -> None:
    logits, A_log, dt_bias = torch.randn(2, 900, HV, K), torch.rand(HV), torch.randn(HV * K)
    results, before = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            results.append(check(logits, A_log, dt_bias, None))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
