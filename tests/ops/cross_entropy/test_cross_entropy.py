"""Cross entropy and its gradient against ``torch.nn.functional``, backend by backend."""

import pytest
import torch
from torch.nn import functional as F

from deltamoe.ops.backend import BACKENDS
from deltamoe.ops.cross_entropy import cross_entropy_

NONE = -100
BACKEND_NAMES = [backend.name for backend in BACKENDS["cross_entropy"]]


def problem(rows, vocab, dtype=torch.float32, size=3.0):
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (size * torch.randn(rows, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1::3] = NONE
    return logits, targets


def expected(logits, targets, scale):
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=NONE, reduction="none")
    (gradient,) = torch.autograd.grad(scale * losses.sum(), wide)
    return losses.detach(), gradient


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 61), (9, 64), (4, 1027), (0, 5)])
@pytest.mark.parametrize("threads", [1, 2])
def test_losses_and_gradients(backend, shape, threads):
    logits, targets = problem(*shape)
    losses, gradient = expected(logits, targets, 0.25)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cross_entropy_(logits, targets, no_target=NONE, gradient_scale=0.25, backend=backend)
    finally:
        torch.set_num_threads(before)
    # fp32: a sum of up to a thousand exponentials, then a logarithm near 10
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_bf16_is_read_and_written_and_summed_in_fp32(backend):
    logits, targets = problem(6, 333, torch.bfloat16)
    losses, gradient = expected(logits, targets, 1.0)
    got = cross_entropy_(logits, targets, no_target=NONE, gradient_scale=1.0, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8, atol=1e-7)  # 8 bits


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_columns_of_a_wider_matrix(backend):
    wide, targets = problem(6, 50)
    logits = wide[:, 7:40]
    targets[targets != NONE] %= 33
    losses, gradient = expected(logits.clone(), targets, 2.0)
    outside = wide[:, 40:].clone()
    got = cross_entropy_(logits, targets, no_target=NONE, gradient_scale=2.0, backend=backend)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide[:, 40:], outside)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_large_logits_do_not_overflow(backend):
    logits, targets = problem(8, 40, size=1e4)
    losses, gradient = expected(logits, targets, 1.0)
    got = cross_entropy_(logits, targets, no_target=NONE, gradient_scale=1.0, backend=backend)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_spoils_its_own_row_alone(backend, bad):
    logits, targets = problem(5, 90)
    good = cross_entropy_(logits.clone(), targets, no_target=NONE, backend=backend)
    logits[2, 71] = bad
    got = cross_entropy_(logits, targets, no_target=NONE, gradient_scale=1.0, backend=backend)
    assert got[2].isnan()
    assert torch.equal(got[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
    assert logits[2].isnan().any()


def test_a_target_outside_the_columns_is_refused():
    logits, targets = problem(4, 6)
    targets[2] = 6
    with pytest.raises(IndexError, match="6 columns"):
        cross_entropy_(logits, targets, no_target=NONE, backend="native")
