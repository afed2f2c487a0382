"""The model's shape, its initial weights, its refusals, and gradients through all of it."""

import subprocess
import sys

import pytest
import torch

from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config, tiny_model


def test_same_seed_same_weights() -> None:
    one, two, three = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name])
    assert not torch.equal(one.embedding.weight, three.embedding.weight)


def test_a_tensor_starts_the_same_whatever_else_the_model_has() -> None:
    shallow, deep = tiny_model(), tiny_model(tie_embeddings=True)
    assert torch.equal(shallow.blocks[0].mixer.A_log, deep.blocks[0].mixer.A_log)


def test_initial_decay_is_as_published() -> None:
    model = tiny_model()
    for block in model.blocks[:3]:
        assert (block.mixer.A_log.exp() >= 1).all()
        assert (block.mixer.A_log.exp() <= 16).all()
        step = torch.nn.functional.softplus(block.mixer.dt_bias)
        assert (step >= 0.99e-3).all()
        assert (step <= 1.01e-1).all()


def test_every_tensor_is_initialised() -> None:
    model = HybridLM(tiny_config())
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.initialize(0)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name


def test_gradients_with_recomputed_activations_are_the_same() -> None:
    ids = torch.randint(0, 257, (2, 30))
    gradients = []
    for recompute in (False, True):
        model = tiny_model(torch.float64).train()
        model.checkpoint_activations = recompute
        out = model.hidden(ids)
        assert sum(int(r.counts.sum()) for r in out.routings if r is not None) == 3 * 2 * 60
        model.logits(out.hidden).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-10)


def test_backends_can_be_chosen() -> None:
    model = tiny_model(torch.float64)
    ids = torch.randint(0, 257, (1, 40))
    with torch.no_grad():
        fast, _ = model(ids)
        model.use_backends(kda="reference", experts="reference")
        slow, _ = model(ids)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[0, 257]], {}, "vocabulary has 257"),
        ([[-1, 3]], {}, "vocabulary has 257"),
        ([[0, 1]], {"lengths": torch.tensor([3])}, "expected 0 to T = 2"),
        ([[0, 1]], {"state": 2}, "the state has 2 rows and ids has 1"),
    ],
)
def test_what_cannot_be_read_is_refused(ids: list, options: dict, message: str) -> None:
    model = tiny_model()
    if "state" in options:
        options = {"state": model.initial_state(options["state"])}
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(ids), **options)


def test_no_token_at_all() -> None:
    model = tiny_model()
    logits, state = model(torch.zeros(2, 0, dtype=torch.int64))
    assert logits.shape == (2, 0, 257)
    logits, state = model(torch.tensor([[1], [2]]), state)
    expected, _ = model(torch.tensor([[1], [2]]))
    torch.testing.assert_close(logits, expected)


def test_logits_are_wide() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert tiny_model()(ids)[0].dtype == torch.float32
        assert tiny_model(torch.float64)(ids)[0].dtype == torch.float64
        assert tiny_model(torch.bfloat16)(ids)[0].dtype == torch.float32


def test_building_a_model_without_memory_loads_no_compiler() -> None:
    """It would take longer than reading a gigabyte of weights."""
    program = """
import sys, torch
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config
with torch.device("meta"):
    HybridLM(tiny_config())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
