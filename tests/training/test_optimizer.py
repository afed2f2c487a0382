"""MuonAdamW against torch's own optimizers, and its rules, batching and named state."""

import pytest
import torch
from torch import Tensor

from deltamoe.config.run import OptimizerConfig
from deltamoe.errors import CheckpointError
from deltamoe.ops.muon import orthogonalize
from deltamoe.training.optimizer import MuonAdamW, rule_for

CONFIG = OptimizerConfig(lr=3e-3, muon_lr=1e-2, weight_decay=0.1, eps=1e-8)


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator))


def step_together(optimizers, parameters, *, num_steps: int = 3) -> None:
    """Give each list of parameters the same gradients, ``num_steps`` times."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        for matching in zip(*parameters, strict=True):
            gradient = torch.randn(matching[0].shape, generator=generator)
            for p in matching:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


def clones(parameters: list[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in parameters]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_a_matrix_moves_as_under_torch_muon(shape):
    ours, theirs = [parameter(*shape)], [parameter(*shape)]
    start = ours[0].detach().clone()
    mine = MuonAdamW([("mixer.q_proj.weight", ours[0])], CONFIG, newton_schulz_dtype=torch.bfloat16)
    torchs = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    step_together([mine, torchs], [ours, theirs])
    # Both iterate in bf16 (8 bits), in another order: each is about 1 % from the exact update.
    moved = (theirs[0] - start).norm()
    assert (ours[0] - theirs[0]).norm() < 0.02 * moved


def test_momentum_and_decay_equal_torch_muon_exactly():
    # With the same orthogonal factor the rest is fp32 arithmetic in the same order.
    ours, theirs = [parameter(8, 8)], [parameter(8, 8)]
    mine = MuonAdamW([("mixer.o_proj.weight", ours[0])], CONFIG, newton_schulz_dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs, lr=1e-2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    step_together([mine, torchs], [ours, theirs])
    buffer = torchs.state[theirs[0]]["momentum_buffer"]
    assert torch.equal(mine.named_state()["mixer.o_proj.weight.momentum"], buffer)


def test_batched_newton_schulz_is_a_loop_over_experts():
    stack = parameter(5, 12, 20)
    experts = [torch.nn.Parameter(stack[i].detach().clone()) for i in range(5)]
    batched = MuonAdamW([("blocks.1.channel.experts.w_up", stack)], CONFIG)
    loop = MuonAdamW(
        [(f"blocks.{i}.channel.w_up.weight", p) for i, p in enumerate(experts)], CONFIG
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for i, p in enumerate(experts):
            p.grad = stack.grad[i].clone()
        batched.step()
        loop.step()
    # fp32, the same products in another order.
    torch.testing.assert_close(stack, torch.stack([*experts]), rtol=1e-5, atol=1e-6)


def test_tall_and_wide_matrices_share_a_batch_without_mixing():
    names = ["blocks.0.channel.w_up.weight", "blocks.0.channel.w_down.weight"]
    together = [parameter(20, 12, seed=1), parameter(12, 20, seed=2)]
    apart = clones(together)
    optimizers = [MuonAdamW(zip(names, together, strict=True), CONFIG)]
    optimizers += [MuonAdamW([(n, p)], CONFIG) for n, p in zip(names, apart, strict=True)]
    step_together(optimizers, [together, apart])
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # fp32 rounding, as above


def test_slicing_a_batch_changes_nothing_but_rounding(monkeypatch):
    whole, sliced = [parameter(7, 6, 10)], [parameter(7, 6, 10)]
    name = "blocks.1.channel.experts.w_up"
    step_together([MuonAdamW([(name, whole[0])], CONFIG)], [whole])
    monkeypatch.setattr("deltamoe.ops.muon.reference.SLICE_ELEMENTS", 130)  # two matrices
    step_together([MuonAdamW([(name, sliced[0])], CONFIG)], [sliced])
    torch.testing.assert_close(whole[0], sliced[0], rtol=1e-5, atol=1e-6)


def test_orthogonalize_pushes_singular_values_toward_one():
    matrices = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    # The quintic does not converge to 1; it swings between about 0.7 and 1.2.
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_gradient_of_zeros_is_harmless():
    p = parameter(4, 6)
    before = p.detach().clone()
    optimizer = MuonAdamW([("blocks.0.channel.w_up.weight", p)], CONFIG)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p, before * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_move_as_under_torch_adamw(name):
    config = OptimizerConfig(name=name, lr=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
    names = ["embedding.weight", "blocks.0.mixer.A_log", "norm.weight"]
    ours = [parameter(11, 6), parameter(4), parameter(6)]
    theirs = clones(ours)
    mine = MuonAdamW(zip(names, ours, strict=True), config)
    torchs = torch.optim.AdamW(
        [
            {"params": theirs[:1], "weight_decay": 0.1},
            {"params": theirs[1:], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    step_together([mine, torchs], [ours, theirs])
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "method", "has_weight_decay"),
    [
        ("embedding.weight", "adamw", True),
        ("head.weight", "adamw", True),
        ("norm.weight", "adamw", False),
        ("blocks.3.mixer_norm.weight", "adamw", False),
        ("blocks.3.mixer.output_norm.weight", "adamw", False),
        ("blocks.3.mixer.q_norm.weight", "adamw", False),
        ("blocks.3.mixer.A_log", "adamw", False),
        ("blocks.3.mixer.dt_bias", "adamw", False),
        ("blocks.3.mixer.k_conv.weight", "adamw", True),
        ("blocks.3.mixer.beta_proj.weight", "adamw", True),
        ("blocks.3.channel.router.noise_proj.weight", "adamw", True),
        ("blocks.3.channel.router.weight", "muon", True),
        ("blocks.3.mixer.k_proj.weight", "muon", True),
        ("blocks.3.mixer.decay_up.weight", "muon", True),
        ("blocks.3.mixer.output_gate_down.weight", "muon", True),
        ("blocks.3.mixer.latent_proj.weight", "muon", True),
        ("blocks.3.mixer.latent_up.weight", "muon", True),
        ("blocks.3.mixer.q_up.weight", "muon", True),
        ("blocks.3.channel.experts.w_down", "muon", True),
        ("blocks.3.channel.shared_expert.w_gate.weight", "muon", True),
        ("blocks.0.channel.w_up.weight", "muon", True),
    ],
)
def test_the_name_decides(name, method, has_weight_decay):
    rule = rule_for(name)
    assert (rule.method, rule.has_weight_decay) == (method, has_weight_decay)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.surprise"):
        rule_for("blocks.0.mixer.surprise")


def test_the_schedule_scales_both_parts():
    names = ["embedding.weight", "blocks.0.channel.w_up.weight"]
    optimizer = MuonAdamW(zip(names, [parameter(4, 6), parameter(4, 6)], strict=True), CONFIG)
    optimizer.scale_learning_rates(0.5)
    assert {g["method"]: g["lr"] for g in optimizer.param_groups} == {"adamw": 1.5e-3, "muon": 5e-3}


def test_named_state_carries_on_exactly():
    names = ["embedding.weight", "blocks.1.channel.experts.w_up"]
    parameters = [parameter(11, 6), parameter(3, 4, 6)]
    optimizer = MuonAdamW(zip(names, parameters, strict=True), CONFIG)
    step_together([optimizer], [parameters])
    saved = {key: tensor.clone() for key, tensor in optimizer.named_state().items()}
    copies = clones(parameters)
    other = MuonAdamW(zip(reversed(names), reversed(copies), strict=True), CONFIG)
    other.load_named_state(saved)
    step_together([optimizer, other], [parameters, copies])
    for p, q in zip(parameters, copies, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("key", "shape", "complaint"),
    [
        ("head.weight.first_moment", (4, 6), "no parameter"),
        ("embedding.weight.first_moment", (6, 4), "shape"),
    ],
)
def test_foreign_state_is_refused(key, shape, complaint):
    optimizer = MuonAdamW([("embedding.weight", parameter(4, 6))], CONFIG)
    with pytest.raises(CheckpointError, match=complaint):
        optimizer.load_named_state({key: torch.zeros(shape)})
