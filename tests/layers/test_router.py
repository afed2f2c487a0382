"""The router: each way of scoring against its formula, ties, groups, bias, noise."""

import pytest
import torch

from deltamoe.config.model import MoeConfig
from deltamoe.layers import Router

N, D = 50, 6


def router(**changes) -> Router:
    settings = {"num_experts": 8, "experts_per_token": 3, "expert_dim": 4, **changes}
    layer = Router(D, MoeConfig(**settings)).double()
    torch.nn.init.normal_(layer.weight)
    return layer.eval()


def test_sigmoid_scores_each_expert_on_its_own() -> None:
    layer = router(routed_scale=2.446)
    x = torch.randn(N, D, dtype=torch.float64)
    got = layer(x)
    scores = (x @ layer.weight.T).sigmoid()
    best = scores.topk(3).indices
    torch.testing.assert_close(got.expert_ids, best)
    chosen = scores.gather(1, best)
    expected = 2.446 * chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(got.expert_weights, expected, rtol=1e-12, atol=0)
    sums = got.expert_weights.sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.446), rtol=1e-12, atol=0)
    assert got.counts.tolist() == torch.bincount(best.flatten(), minlength=8).tolist()


def test_the_bias_weighs_only_if_told_to() -> None:
    """The published modeling code adds the bias in place, so there it weighs too."""
    published = {"routed_scale": 2.446, "num_groups": 4, "groups_per_token": 2}
    plain, biased = router(**published), router(**published, has_biased_weights=True)
    plain.balance_bias.normal_()
    biased.load_state_dict(plain.state_dict())
    x = torch.randn(N, D, dtype=torch.float64)
    one, other = plain(x), biased(x)
    assert torch.equal(one.expert_ids, other.expert_ids)
    assert torch.equal(one.scores, other.scores)
    for got, bias in ((one, 0.0), (other, plain.balance_bias.double())):
        chosen = (one.scores + bias).gather(1, one.expert_ids)
        expected = 2.446 * chosen / (chosen.sum(1, keepdim=True) + 1e-20)
        torch.testing.assert_close(got.expert_weights, expected, rtol=1e-12, atol=0)
    assert not torch.equal(one.expert_weights, other.expert_weights)


def test_both_orders_of_softmax_agree_once_renormalised() -> None:
    before, after = router(scoring="softmax"), router(scoring="topk_softmax")
    after.load_state_dict(before.state_dict())
    x = torch.randn(N, D, dtype=torch.float64)
    one, other = before(x), after(x)
    assert torch.equal(one.expert_ids, other.expert_ids)
    torch.testing.assert_close(one.expert_weights, other.expert_weights, rtol=1e-12, atol=0)


def test_softmax_without_renormalising_sums_to_less_than_one() -> None:
    layer = router(scoring="softmax", renormalize=False)
    x = torch.randn(N, D, dtype=torch.float64)
    got = layer(x)
    expected = (x @ layer.weight.T).softmax(1).gather(1, got.expert_ids)
    torch.testing.assert_close(got.expert_weights, expected, rtol=1e-12, atol=0)
    assert (got.expert_weights.sum(1) < 1).all()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_one_expert_a_token_still_teaches_the_router(scoring: str) -> None:
    layer = router(scoring=scoring, experts_per_token=1)
    weights = layer(torch.randn(N, D, dtype=torch.float64)).expert_weights
    (gradient,) = torch.autograd.grad(weights.sum(), layer.weight)
    assert gradient.abs().max() > 1e-3


def test_the_bias_chooses_and_never_weighs() -> None:
    layer = router(renormalize=False)
    x = torch.randn(N, D, dtype=torch.float64)
    layer.balance_bias[5] = 10.0
    got = layer(x)
    assert (got.expert_ids[:, 0] == 5).all()
    scores = (x @ layer.weight.T).sigmoid()
    torch.testing.assert_close(got.expert_weights, scores.gather(1, got.expert_ids))


def test_ties_go_to_the_lower_index() -> None:
    layer = router()
    torch.nn.init.zeros_(layer.weight)
    got = layer(torch.randn(N, D, dtype=torch.float64))
    assert got.expert_ids.tolist() == [[0, 1, 2]] * N


def test_only_the_best_groups_are_open() -> None:
    layer = router(num_groups=4, groups_per_token=2)
    layer.balance_bias.sub_(5.0)  # biased scores below zero must not lose to a closed group's
    x = torch.randn(N, D, dtype=torch.float64)
    got = layer(x)
    preference = (x @ layer.weight.T).sigmoid() - 5.0
    for n in range(N):
        by_group = preference[n].view(4, 2).sum(1)  # the two best of two
        open_groups = by_group.topk(2).indices
        allowed = [e for e in range(8) if e // 2 in open_groups]
        best = sorted(allowed, key=lambda e: -preference[n, e])[:3]
        assert got.expert_ids[n].tolist() == best


def test_all_groups_open_is_no_limit() -> None:
    layer, free = router(num_groups=4, groups_per_token=4), router()
    free.load_state_dict(layer.state_dict())
    x = torch.randn(N, D, dtype=torch.float64)
    assert torch.equal(layer(x).expert_ids, free(x).expert_ids)


@pytest.mark.parametrize("noise", [{"has_noisy_topk": True}, {"router_jitter": 0.3}])
def test_noise_only_while_training(noise: dict) -> None:
    layer = router(**noise)
    x = torch.randn(N, D, dtype=torch.float64)
    quiet = layer(x)
    assert torch.equal(layer(x).scores, quiet.scores)
    layer.train()
    assert not torch.equal(layer(x).scores, quiet.scores)
    torch.manual_seed(3)
    first = layer(x).scores
    torch.manual_seed(3)
    assert torch.equal(layer(x).scores, first)


def test_routing_is_fp32_under_autocast() -> None:
    layer = router().float()
    x = torch.randn(N, D)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.logits.dtype == torch.float32
    torch.testing.assert_close(got.logits, x @ layer.weight.T)
