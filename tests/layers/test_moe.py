"""The sparse channel as a whole."""

import pytest
import torch

from deltamoe.config.model import MoeConfig
from deltamoe.layers import Moe

B, T, D = 2, 9, 6


def moe(**changes) -> Moe:
    settings = {"num_experts": 5, "experts_per_token": 2, "expert_dim": 7, **changes}
    layer = Moe(D, MoeConfig(**settings)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.eval()


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("expert", ["swiglu", "ffn"])
def test_weighted_sum_of_the_chosen_and_the_shared(shared: int, expert: str) -> None:
    layer = moe(num_shared_experts=shared, expert=expert)
    x = torch.randn(B, T, D, dtype=torch.float64)
    y, routing = layer(x)
    e = layer.experts
    for n, token in enumerate(x.flatten(0, 1)):
        expected = torch.zeros_like(token)
        for i, weight in zip(routing.expert_ids[n], routing.expert_weights[n], strict=True):
            up = e.w_up[i] @ token
            if expert == "ffn":
                hidden = torch.nn.functional.gelu(up)
            else:
                hidden = torch.nn.functional.silu(e.w_gate[i] @ token) * up
            expected = expected + weight * (e.w_down[i] @ hidden)
        if shared:
            expected = expected + layer.shared_expert(token)
        torch.testing.assert_close(y.flatten(0, 1)[n], expected, rtol=0, atol=1e-10)


def test_every_expert_equals_the_dense_sum() -> None:
    layer = moe(experts_per_token=5, scoring="softmax", num_shared_experts=0)
    x = torch.randn(B, T, D, dtype=torch.float64)
    weights = (x @ layer.router.weight.T).softmax(-1)
    e = layer.experts
    up = torch.einsum("btd,efd->btef", x, e.w_up)
    hidden = torch.nn.functional.silu(torch.einsum("btd,efd->btef", x, e.w_gate)) * up
    expected = torch.einsum("btef,edf,bte->btd", hidden, e.w_down, weights)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-10)


def test_permuting_the_experts_changes_nothing() -> None:
    layer, other = moe(), moe()
    order = torch.randperm(5)
    weights = layer.state_dict()
    for name in (
        "router.weight",
        "router.balance_bias",
        *(f"experts.w_{m}" for m in ("gate", "up", "down")),
    ):
        weights[name] = weights[name][order]
    other.load_state_dict(weights)
    x = torch.randn(B, T, D, dtype=torch.float64)
    torch.testing.assert_close(other(x)[0], layer(x)[0], rtol=0, atol=1e-12)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = moe()
    x = torch.randn(B, T, D, dtype=torch.float64)
    whole, _ = layer(x)
    for b in range(B):
        for t in range(T):
            alone, _ = layer(x[b : b + 1, t : t + 1])
            torch.testing.assert_close(whole[b, t], alone[0, 0], rtol=0, atol=1e-12)


def test_capacity_drops_while_training_and_not_in_evaluation() -> None:
    bounded, free = moe(capacity_factor=0.5), moe()
    free.load_state_dict(bounded.state_dict())
    x = torch.randn(B, T, D, dtype=torch.float64)
    y, routing = bounded(x)
    torch.testing.assert_close(y, free(x)[0], rtol=0, atol=1e-12)
    assert routing.num_dropped == 0
    bounded.train()
    y, routing = bounded(x)
    # 18 tokens x 2 choices over 5 experts at factor 0.5: 4 rows an expert, 20 of 36 at most
    assert routing.num_dropped >= 16
    assert not torch.allclose(y, free(x)[0])


def test_gradients_reach_router_experts_and_shared() -> None:
    layer = moe().train()
    layer(torch.randn(B, 40, D, dtype=torch.float64))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
