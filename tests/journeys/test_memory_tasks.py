"""KDA learns what only a memory can: MQAR, Palindrome and Stack (the paper's section 5.1).

Two layers of KDA and no attention. The short versions run everywhere; `make test-slow` runs the
paper's length of 256 with its 2 heads of 128.
"""

import pytest
import torch
import torch.nn.functional as F

from deltamoe.config.model import KdaConfig, ModelConfig
from deltamoe.config.run import OptimizerConfig
from deltamoe.evaluation.synthetic import IGNORED, Examples, accuracy, mqar, palindrome, stack
from deltamoe.layers import Kda
from deltamoe.model import HybridLM
from deltamoe.training.optimizer import MuonAdamW

VOCAB = 64


def short(task: str, batch: int, seed: int) -> Examples:
    if task == "mqar":
        return mqar(batch, 8, vocab_size=VOCAB, seed=seed)
    if task == "palindrome":
        return palindrome(batch, 12, vocab_size=VOCAB, seed=seed)
    return stack(batch, 12, num_stacks=4, vocab_size=VOCAB, seed=seed)


def long(task: str, batch: int, seed: int) -> Examples:
    if task == "mqar":
        return mqar(batch, 64, num_queries=64, vocab_size=256, seed=seed)
    if task == "palindrome":
        return palindrome(batch, 127, vocab_size=VOCAB, seed=seed)
    return stack(batch, 85, num_stacks=64, vocab_size=256, seed=seed)


def learned(task, examples, *, steps: int, head_dim: int, vocab_size: int, lr: float) -> float:
    """The accuracy on fresh sequences after training on ``steps`` batches of others."""
    config = ModelConfig(
        vocab_size=vocab_size,
        dim=2 * head_dim,
        num_layers=2,
        mlp_dim=4 * head_dim,
        mla_every=0,
        first_dense_layers=2,
        kda=KdaConfig(num_heads=2, key_dim=head_dim, value_dim=head_dim),
    )
    model = HybridLM(config)
    model.initialize(0)
    model.train()
    settings = OptimizerConfig(lr=lr, muon_lr=3 * lr, weight_decay=0.0)
    optimizer = MuonAdamW(model.named_parameters(), settings)
    for step in range(steps):
        ids, targets = examples(task, 64, seed=1 + step)
        logits, _ = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        warm_up, decay = (step + 1) / 20, (steps - step) / (0.3 * steps)
        optimizer.scale_learning_rates(min(1.0, warm_up, decay))
        optimizer.step()
    ids, targets = examples(task, 256, seed=0)
    with torch.no_grad():
        return float(accuracy(model(ids)[0], targets))


@pytest.mark.parametrize("task", ["mqar", "palindrome", "stack"])
def test_kda_learns_to_remember(task: str) -> None:
    got = learned(task, short, steps=200, head_dim=32, vocab_size=VOCAB, lr=3e-3)
    assert got > 0.95  # of 32 or 63 symbols: chance is below 0.04


def test_without_writing_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory does the work: with beta at zero the same model learns next to nothing."""
    monkeypatch.setattr(Kda, "beta", lambda self, x: x.new_zeros(*x.shape[:2], 2))
    assert learned("mqar", short, steps=100, head_dim=32, vocab_size=VOCAB, lr=3e-3) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mqar", "palindrome", "stack"])
def test_the_papers_length(task: str) -> None:
    got = learned(task, long, steps=2000, head_dim=128, vocab_size=256, lr=1e-3)
    assert got > 0.99  # the paper's figure 4 has 100 % for all three
