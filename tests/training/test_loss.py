"""Cross entropy: the right number, in slices, however the step is cut."""

import pytest
import torch
from torch.nn import functional as F

from deltamoe.data import NO_TARGET
from deltamoe.training.loss import next_token_loss

N, D, VOCAB = 24, 8, 11


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[::5] = NO_TARGET
    head = torch.nn.Linear(D, VOCAB, bias=False, dtype=torch.float64)
    return hidden, targets, head


def loss_and_gradients(hidden, targets, head, num_targets):
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    loss = next_token_loss(hidden, targets, head, num_targets=num_targets, vocab_size=VOCAB)
    loss.backward()
    return loss.detach(), hidden.grad, head.weight.grad.clone()


def test_it_is_the_mean_over_valid_targets(problem):
    hidden, targets, head = problem
    num_targets = int((targets != NO_TARGET).sum())
    loss, _, _ = loss_and_gradients(hidden, targets, head, num_targets)
    expected = F.cross_entropy(head(hidden).float(), targets, ignore_index=NO_TARGET)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("rows", [1, 7, 24])
def test_slices_of_the_head_change_nothing(problem, rows, monkeypatch):
    whole = loss_and_gradients(*problem, 10)
    monkeypatch.setattr("deltamoe.training.loss.SLICE_LOGITS", rows * VOCAB)
    sliced = loss_and_gradients(*problem, 10)
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # fp32 sums in another order


def test_slices_never_hold_all_logits(problem, monkeypatch):
    hidden, targets, head = problem
    monkeypatch.setattr("deltamoe.training.loss.SLICE_LOGITS", 6 * VOCAB)
    widths = []
    head.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
    loss_and_gradients(hidden, targets, head, 10)
    assert max(widths) == 6
    assert sum(widths) == 2 * N  # once forward, once again in the backward pass


def test_micro_batches_of_uneven_targets_add_up(problem):
    hidden, targets, head = problem
    num_targets = int((targets != NO_TARGET).sum())
    whole = loss_and_gradients(hidden, targets, head, num_targets)
    parts = [
        loss_and_gradients(hidden[a:b], targets[a:b], head, num_targets)
        for a, b in [(0, 1), (1, 10), (10, N)]
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])


def test_a_micro_batch_without_targets_counts_nothing(problem):
    hidden, targets, head = problem
    loss, gradient, _ = loss_and_gradients(hidden, torch.full_like(targets, NO_TARGET), head, 5)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
