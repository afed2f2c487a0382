"""Cross entropy: the right number, in slices, however the step is cut."""

import pytest
import torch
from torch.nn import functional as F

from deltamoe.data import NO_TARGET
from deltamoe.training.loss import next_token_loss

N, D, VOCAB = 24, 8, 11


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[::5] = NO_TARGET
    head = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), targets, head.to(dtype)


def loss_and_gradients(hidden, targets, head, num_targets):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = next_token_loss(hidden, targets, head, num_targets=num_targets)
    (3 * loss).backward()  # a factor behind the loss reaches the gradients
    return loss.detach(), hidden.grad / 3, head.grad / 3


def expected(hidden, targets, head, num_targets):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    total = F.cross_entropy(hidden @ head.T, targets, ignore_index=NO_TARGET, reduction="sum")
    loss = total / num_targets
    return loss.detach(), *torch.autograd.grad(loss, [hidden, head])


# fp32 rounds sums of D or N products of unit numbers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_it_is_the_cross_entropy_in_slices_of_any_size(dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr("deltamoe.training.loss.SLICE_LOGITS", rows * VOCAB)
    monkeypatch.setattr("deltamoe.training.loss.MIN_ROWS", 1)
    got = loss_and_gradients(*problem(dtype), 10)
    for a, b in zip(got, expected(*problem(dtype), 10), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_autocast_rounds_the_products_alone():
    hidden, targets, head = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(hidden, targets, head, 10)
    wide = [x.bfloat16().double() for x in (hidden, head)]
    wanted = expected(wide[0], targets, wide[1], 10)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        # logits and their gradients are rounded to 8 bits; logits reach about 10
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.01)


def test_slices_never_hold_all_logits(monkeypatch):
    monkeypatch.setattr("deltamoe.training.loss.SLICE_LOGITS", 6 * VOCAB)
    monkeypatch.setattr("deltamoe.training.loss.MIN_ROWS", 1)
    heights = []

    def watch(logits, *arguments, **options):
        heights.append(len(logits))
        return cross_entropy_(logits, *arguments, **options)

    from deltamoe.training.loss import cross_entropy_

    monkeypatch.setattr("deltamoe.training.loss.cross_entropy_", watch)
    loss_and_gradients(*problem(), 10)
    assert heights == [6, 6, 6, 6]  # each once: nothing is computed again


def test_micro_batches_of_uneven_targets_add_up():
    hidden, targets, head = problem()
    num_targets = int((targets != NO_TARGET).sum())
    whole = loss_and_gradients(hidden, targets, head, num_targets)
    parts = [
        loss_and_gradients(hidden[a:b], targets[a:b], head, num_targets)
        for a, b in [(0, 1), (1, 10), (10, N)]
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])


def test_a_micro_batch_without_targets_counts_nothing():
    hidden, targets, head = problem()
    loss, gradient, _ = loss_and_gradients(hidden, torch.full_like(targets, NO_TARGET), head, 5)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_gradients_none_are_computed():
    hidden, targets, head = problem()
    with torch.no_grad():
        loss = next_token_loss(hidden, targets, head.requires_grad_(), num_targets=10)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected(hidden, targets, head.detach(), 10)[0])
