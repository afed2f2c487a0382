"""The balance losses at their known values, and the bias update on a router that leans."""

import pytest
import torch

from deltamoe.model import Routing
from deltamoe.training.balance import (
    load_balance_loss,
    max_violation,
    num_dead_experts,
    sequence_balance_loss,
    update_balance_bias,
    z_loss,
)


def route(logits: torch.Tensor, num_chosen: int, bias=0.0, *, scoring="sigmoid") -> Routing:
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(dim=-1)
    ids = (scores + bias).topk(num_chosen, dim=-1).indices
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    return Routing(logits, scores, ids, scores.gather(1, ids), counts, torch.tensor(0))


def balanced(num_tokens: int, num_experts: int) -> Routing:
    """Token t prefers experts t and t + 1, all alike: every expert is chosen equally often."""
    logits = torch.zeros(num_tokens, num_experts)
    for t in range(num_tokens):
        logits[t, t % num_experts] = 2.0
        logits[t, (t + 1) % num_experts] = 1.0
    return route(logits, 2)


def test_perfect_balance_costs_one():
    routing = balanced(12, 4)
    torch.testing.assert_close(load_balance_loss(routing), torch.tensor(1.0))
    borders = torch.tensor([0, 4, 12])
    torch.testing.assert_close(sequence_balance_loss(routing, borders), torch.tensor(1.0))


def test_collapse_onto_one_expert_costs_as_much_as_there_are_experts():
    logits = torch.full((10, 5), -40.0)
    logits[:, 2] = 40.0
    loss = load_balance_loss(route(logits, 1, scoring="softmax"))
    torch.testing.assert_close(loss, torch.tensor(5.0))


def test_load_balance_is_switch_s_formula():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    routing = route(logits, 2, scoring="softmax")
    share = routing.counts / (30 * 2)
    expected = 6 * (share * routing.scores.mean(dim=0)).sum()
    torch.testing.assert_close(load_balance_loss(routing), expected)


def test_sequences_are_judged_on_their_own():
    # Each sequence uses one expert only; together they are balanced.
    logits = torch.full((8, 2), -40.0)
    logits[:4, 0] = 40.0
    logits[4:, 1] = 40.0
    routing = route(logits, 1, scoring="softmax")
    torch.testing.assert_close(load_balance_loss(routing), torch.tensor(1.0))
    apart = sequence_balance_loss(routing, torch.tensor([0, 4, 8]))
    torch.testing.assert_close(apart, torch.tensor(2.0))


def test_sequence_loss_is_the_token_weighted_mean_of_single_sequences():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    borders = [0, 3, 3, 20]  # an empty sequence adds nothing
    parts = [(logits[a:b], b - a) for a, b in [(0, 3), (3, 20)]]
    expected = sum(load_balance_loss(route(part, 2)) * n for part, n in parts) / 20
    torch.testing.assert_close(
        sequence_balance_loss(route(logits, 2), torch.tensor(borders)), expected
    )


def test_the_gradient_pushes_the_busy_expert_down():
    logits = torch.zeros(16, 4)
    logits[:, 1] = 1.0
    logits.requires_grad_()
    load_balance_loss(route(logits, 1)).backward()
    assert (logits.grad[:, 1] > 0).all()
    assert (logits.grad[:, [0, 2, 3]] < 0).all()


def test_z_loss_is_the_mean_squared_log_partition():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    log2 = torch.tensor(2.0).log()
    expected = (log2**2 + (3 + log2) ** 2) / 2
    torch.testing.assert_close(z_loss(route(logits, 1)), expected)


@pytest.mark.parametrize("rule", ["sign", "centered_sign"])
def test_the_bias_evens_out_a_router_that_leans(rule):
    generator = torch.Generator().manual_seed(0)
    lean = torch.linspace(2.0, -2.0, 8)  # expert 0 is everybody's favourite
    bias = torch.zeros(8)
    violations = []
    for _ in range(400):
        routing = route(torch.randn(256, 8, generator=generator) + lean, 2, bias)
        violations.append(max_violation(routing.counts))
        update_balance_bias(bias, routing.counts, rule=rule, rate=5e-3)
    assert violations[0] > 1.5
    # The rest is the noise of 64 assignments an expert and the step of the bias itself.
    assert sum(violations[-50:]) / 50 < 0.4
    if rule == "centered_sign":
        assert abs(bias.mean()) < 1e-6  # rounding of 400 updates


def test_sign_update_is_exact():
    bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
    update_balance_bias(bias, torch.tensor([9, 1, 4, 6]), rule="sign", rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([0.4, 0.1, 0.1, -0.6]))


def test_none_leaves_the_bias_alone():
    bias = torch.zeros(2)
    update_balance_bias(bias, torch.tensor([9, 1]), rule="none", rate=0.1)
    assert torch.equal(bias, torch.zeros(2))


def test_alarms():
    counts = torch.tensor([6, 0, 2, 0])
    assert max_violation(counts) == pytest.approx(2.0)
    assert num_dead_experts(counts) == 2
    assert max_violation(torch.zeros(4, dtype=torch.int64)) == 0.0
