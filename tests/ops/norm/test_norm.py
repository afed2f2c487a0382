"""Norms against their formulas, and what half precision may cost."""

import torch

from deltamoe.ops.norm import l2_normalize, rms_norm


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 4, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-12, atol=0)


def test_rms_norm_is_computed_in_fp32() -> None:
    x = (300 * torch.randn(2, 64)).half()  # squares overflow fp16
    out = rms_norm(x, torch.ones(64), 1e-5)
    assert out.dtype == torch.float16
    assert out.isfinite().all()


def test_l2_normalize_adds_eps_to_the_sum() -> None:
    x = torch.randn(5, 9, dtype=torch.float64) * 1e-3
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(l2_normalize(x), expected, rtol=1e-12, atol=0)
    assert l2_normalize(torch.zeros(2, 3)).eq(0).all()
